"""The mathematics of every optimizer: one function on one element each, in order of increasing complexity.

A rule maps a parameter ``p``, its gradient ``g``, its states and its coefficients to the new ``p`` and the new states. It is
straight-line code without literals and flags, and runs as it stands on NumPy arrays and torch tensors and, compiled, in the
kernels. Beside it stands the function of its coefficients: scalars that are the same for all elements, computed in float64
from the hyperparameters and the parameter's step count (1 at the first step), and rounded once.
"""

from __future__ import annotations

from fusedopt.kernels.math import maximum, nonzero, power, sqrt, where
from fusedopt.kernels.rule import Decay, Rule

# --- weight decay: what happens before the rule --------------------------------------------------------------------------


def _l2_decay(p, g, weight_decay):
    # `where`: a weight decay of zero leaves the gradient of an infinite parameter alone.
    return p, where(nonzero(weight_decay), g + weight_decay * p, g)


def _l2_coefficients(weight_decay):
    return (weight_decay,)


#: L2 regularisation: the gradient of ``weight_decay / 2 * |p|^2`` joins the gradient.
l2_decay = Decay(_l2_decay, _l2_coefficients)


def _decoupled_decay(p, g, decay):
    # Not p * (1 - decay): rounded to float32 that factor is 1.3 % off at a decay of 1e-6, and is 1 at 2e-8.
    return where(nonzero(decay), p - decay * p, p), g


def _decoupled_coefficients(lr, weight_decay):
    return (lr * weight_decay,)


#: Decoupled weight decay: ``p (1 - lr weight_decay)`` before the update (Loshchilov and Hutter 2019, Algorithm 2).
decoupled_decay = Decay(_decoupled_decay, _decoupled_coefficients)


# --- gradient descent and momentum ---------------------------------------------------------------------------------------


def _gradient_descent(p, g, lr):
    return (p - lr * g,)


def _gradient_descent_coefficients(step, lr):
    return (lr,)


#: Gradient descent: ``p - lr g``.
gradient_descent = Rule(_gradient_descent, _gradient_descent_coefficients)


def _momentum(p, g, momentum_buffer, lr, momentum, gradient_weight):
    momentum_buffer = momentum * momentum_buffer + gradient_weight * g
    return p - lr * momentum_buffer, momentum_buffer


def _momentum_coefficients(step, lr, momentum, dampening):
    # The first gradient enters undampened.
    return lr, momentum, where(step == 1, 1.0, 1.0 - dampening)


#: Momentum as torch has it: ``b = momentum b + (1 - dampening) g``, then ``p - lr b`` (Sutskever et al. 2013, with b for -v/lr).
momentum = Rule(_momentum, _momentum_coefficients, states=("momentum_buffer",))


def _nesterov_momentum(p, g, momentum_buffer, lr, momentum, gradient_weight):
    momentum_buffer = momentum * momentum_buffer + gradient_weight * g
    return p - lr * (g + momentum * momentum_buffer), momentum_buffer


#: Nesterov's momentum as torch has it: ``p - lr (g + momentum b)`` (Sutskever et al. 2013, section 2).
nesterov_momentum = Rule(_nesterov_momentum, _momentum_coefficients, states=("momentum_buffer",))


def _averaged_momentum(p, g, momentum_buffer, lr, beta, one_minus_beta):
    momentum_buffer = beta * momentum_buffer + one_minus_beta * g
    return p - lr * momentum_buffer, momentum_buffer


def _averaged_momentum_coefficients(step, lr, beta):
    return lr, beta, 1.0 - beta


#: Momentum as an average of gradients: ``d = beta d + (1 - beta) g`` with ``d = 0`` at first, then ``p - lr d``.
averaged_momentum = Rule(_averaged_momentum, _averaged_momentum_coefficients, states=("momentum_buffer",))


# --- Adam ----------------------------------------------------------------------------------------------------------------


def _adam(p, g, exp_avg, exp_avg_sq, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    # Not exp_avg + (1 - beta1) (g - exp_avg): at small beta1 that loses a small gradient beside a large average.
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    # From the left: the square of 1e20 alone would overflow float32.
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    return p - step_size * (exp_avg / (sqrt(exp_avg_sq) + eps)), exp_avg, exp_avg_sq


def _adam_coefficients(step, lr, beta1, beta2, eps):
    # lr (m / c1) / (sqrt(v / c2) + eps) = (lr sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)): one division an element, not three.
    root_correction2 = sqrt(1.0 - power(beta2, step))
    step_size = lr * root_correction2 / (1.0 - power(beta1, step))
    return step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps * root_correction2


#: Adam (Kingma and Ba 2015, Algorithm 1); ``step_size`` and ``eps`` hold both bias corrections.
adam = Rule(_adam, _adam_coefficients, states=("exp_avg", "exp_avg_sq"))


def _amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    # From the left: the square of 1e20 alone would overflow float32.
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return p - step_size * (exp_avg / (sqrt(max_exp_avg_sq) + eps)), exp_avg, exp_avg_sq, max_exp_avg_sq


#: AMSGrad (Reddi et al. 2018, Algorithm 2): the largest second moment so far, taken before bias correction as torch does.
amsgrad = Rule(_amsgrad, _adam_coefficients, states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
