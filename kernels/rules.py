"""The mathematics of every optimizer: one function on one element each, in order of increasing complexity.

A rule maps a parameter ``p``, its gradient ``g``, its states and its coefficients to the new ``p`` and the new states. It is
straight-line code without literals and flags, and runs as it stands on NumPy arrays and torch tensors and, compiled, in the
kernels. Beside it stands the function of its coefficients: scalars that are the same for all elements, computed in float64
from the hyperparameters and the parameter's step count (1 at the first step), and rounded once.
"""

from __future__ import annotations

from fusedopt.kernels.math import absolute, maximum, nonzero, power, sign, sqrt, where
from fusedopt.kernels.rule import Average, Decay, Rule

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


# --- gradients that join a moment before the step: p is the moment ------------------------------------------------------------


def _joining_gradient(p, g, gradient_weight):
    return (p + gradient_weight * g,)


def _momentum_share(step, momentum):
    # The step will multiply the moment by the momentum, and its own gradient enters whole.
    return (1.0 / momentum,)


#: A gradient that joins the buffer of ``momentum`` without dampening, for a step that is yet to come: ``b + g / momentum``.
gradient_into_momentum = Rule(_joining_gradient, _momentum_share)


def _averaged_momentum_share(step, beta):
    return ((1.0 - beta) / beta,)


#: A gradient that joins the buffer of ``averaged_momentum`` likewise: ``d + (1 - beta) / beta g``.
gradient_into_averaged_momentum = Rule(_joining_gradient, _averaged_momentum_share)


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
adam = Rule(
    _adam, _adam_coefficients, states=("exp_avg", "exp_avg_sq"), squares=("exp_avg_sq",), relative={"exp_avg": "exp_avg_sq"}
)


def _amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    # From the left: the square of 1e20 alone would overflow float32.
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return p - step_size * (exp_avg / (sqrt(max_exp_avg_sq) + eps)), exp_avg, exp_avg_sq, max_exp_avg_sq


#: AMSGrad (Reddi et al. 2018, Algorithm 2): the largest second moment so far, taken before bias correction as torch does.
amsgrad = Rule(
    _amsgrad,
    _adam_coefficients,
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    squares=("exp_avg_sq", "max_exp_avg_sq"),
    relative={"exp_avg": "exp_avg_sq"},
)


def _nadam(p, g, exp_avg, exp_avg_sq, gradient_size, average_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    return p - (gradient_size * g + average_size * exp_avg) / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq


def _nadam_coefficients(step, mu_product, lr, beta1, beta2, eps, momentum_decay):
    mu = beta1 * (1.0 - 0.5 * power(0.96, step * momentum_decay))
    next_mu = beta1 * (1.0 - 0.5 * power(0.96, (step + 1.0) * momentum_decay))
    mu_product = mu_product * mu
    root_correction2 = sqrt(1.0 - power(beta2, step))
    gradient_size = lr * root_correction2 * (1.0 - mu) / (1.0 - mu_product)
    average_size = lr * root_correction2 * next_mu / (1.0 - mu_product * next_mu)
    eps = eps * root_correction2
    return gradient_size, average_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, mu_product


#: Adam with Nesterov's momentum (Dozat 2016, Algorithm 2); ``mu_product`` is the product of all momenta so far.
nadam = Rule(
    _nadam,
    _nadam_coefficients,
    states=("exp_avg", "exp_avg_sq"),
    scalars=("mu_product",),
    squares=("exp_avg_sq",),
    relative={"exp_avg": "exp_avg_sq"},
)


def _radam(p, g, exp_avg, exp_avg_sq, step_size, rectifies, beta1, one_minus_beta1, beta2, one_minus_beta2, eps):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    return p - step_size * where(nonzero(rectifies), exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg), exp_avg, exp_avg_sq


def _radam_coefficients(step, lr, beta1, beta2, eps):
    power2 = power(beta2, step)
    step_size = lr / (1.0 - power(beta1, step))
    # Length of the simple average that an exponential one resembles: after infinitely many steps, and now.
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * power2 / (1.0 - power2)
    rectifies = length > 5.0
    # Short averages take the other size; the ones keep their roots and divisions from failing.
    numerator = where(rectifies, (length - 4.0) * (length - 2.0) * longest, 1.0)
    denominator = where(rectifies, (longest - 4.0) * (longest - 2.0) * length, 1.0)
    step_size = step_size * where(rectifies, sqrt(1.0 - power2) * sqrt(numerator / denominator), 1.0)
    return step_size, where(rectifies, 1.0, 0.0), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps


#: Rectified Adam (Liu et al. 2020, Algorithm 2): without the second moment while its variance is not known.
radam = Rule(
    _radam, _radam_coefficients, states=("exp_avg", "exp_avg_sq"), squares=("exp_avg_sq",), relative={"exp_avg": "exp_avg_sq"}
)


def _adamax(p, g, exp_avg, exp_inf, step_size, beta1, one_minus_beta1, beta2, eps):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g
    exp_inf = maximum(beta2 * exp_inf, absolute(g) + eps)
    return p - step_size * (exp_avg / exp_inf), exp_avg, exp_inf


def _adamax_coefficients(step, lr, beta1, beta2, eps):
    return lr / (1.0 - power(beta1, step)), beta1, 1.0 - beta1, beta2, eps


#: Adam with the infinity norm in place of the second moment (Kingma and Ba 2015, Algorithm 2).
adamax = Rule(
    _adamax, _adamax_coefficients, states=("exp_avg", "exp_inf"), nonnegative=("exp_inf",), relative={"exp_avg": "exp_inf"}
)


# --- a step size for each element from past gradients --------------------------------------------------------------------


def _adagrad(p, g, sum, step_size, eps):  # noqa: A002  # as torch calls it
    sum = sum + g * g  # noqa: A001
    return p - step_size * (g / (sqrt(sum) + eps)), sum


def _adagrad_coefficients(step, lr, lr_decay, eps):
    return lr / (1.0 + (step - 1.0) * lr_decay), eps


#: AdaGrad (Duchi et al. 2011, Figure 1, diagonal): divides by the root of the sum of all squares.
adagrad = Rule(_adagrad, _adagrad_coefficients, states=("sum",), squares=("sum",))


def _adadelta(p, g, square_avg, acc_delta, lr, rho, one_minus_rho, eps):
    square_avg = rho * square_avg + one_minus_rho * g * g
    # Not the root of one quotient, which is as small as the square of 1 / g.
    delta = sqrt(acc_delta + eps) * (g / sqrt(square_avg + eps))
    acc_delta = rho * acc_delta + one_minus_rho * delta * delta
    return p - lr * delta, square_avg, acc_delta


def _adadelta_coefficients(step, lr, rho, eps):
    return lr, rho, 1.0 - rho, eps


#: Adadelta (Zeiler 2012, Algorithm 1): steps in the units of past steps.
adadelta = Rule(_adadelta, _adadelta_coefficients, states=("square_avg", "acc_delta"), squares=("square_avg", "acc_delta"))


def _rmsprop(p, g, square_avg, lr, alpha, one_minus_alpha, eps):
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    return p - lr * (g / (sqrt(square_avg) + eps)), square_avg


def _rmsprop_coefficients(step, lr, alpha, eps):
    return lr, alpha, 1.0 - alpha, eps


#: RMSprop (Hinton 2012, lecture 6e): divides by the root of an average of squares.
rmsprop = Rule(_rmsprop, _rmsprop_coefficients, states=("square_avg",), squares=("square_avg",))


def _rmsprop_momentum(p, g, square_avg, momentum_buffer, lr, alpha, one_minus_alpha, eps, momentum):
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    momentum_buffer = momentum * momentum_buffer + g / (sqrt(square_avg) + eps)
    return p - lr * momentum_buffer, square_avg, momentum_buffer


def _rmsprop_momentum_coefficients(step, lr, alpha, eps, momentum):
    return lr, alpha, 1.0 - alpha, eps, momentum


#: RMSprop with momentum over what was divided.
rmsprop_momentum = Rule(
    _rmsprop_momentum, _rmsprop_momentum_coefficients, states=("square_avg", "momentum_buffer"), squares=("square_avg",)
)


def _variance_root(square_avg, grad_avg):
    # Of equal gradients it is zero, and may be negative by rounding: torch makes NaN of that.
    return sqrt(absolute(square_avg - grad_avg * grad_avg))


def _centered_rmsprop(p, g, square_avg, grad_avg, lr, alpha, one_minus_alpha, eps):
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    grad_avg = alpha * grad_avg + one_minus_alpha * g
    return p - lr * (g / (_variance_root(square_avg, grad_avg) + eps)), square_avg, grad_avg


#: Centered RMSprop (Graves 2013, section 4.2): divides by an estimate of the standard deviation.
centered_rmsprop = Rule(
    _centered_rmsprop,
    _rmsprop_coefficients,
    states=("square_avg", "grad_avg"),
    squares=("square_avg",),
    relative={"grad_avg": "square_avg"},
)


def _centered_rmsprop_momentum(p, g, square_avg, momentum_buffer, grad_avg, lr, alpha, one_minus_alpha, eps, momentum):
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    grad_avg = alpha * grad_avg + one_minus_alpha * g
    momentum_buffer = momentum * momentum_buffer + g / (_variance_root(square_avg, grad_avg) + eps)
    return p - lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


#: Centered RMSprop with momentum over what was divided.
centered_rmsprop_momentum = Rule(
    _centered_rmsprop_momentum,
    _rmsprop_momentum_coefficients,
    states=("square_avg", "momentum_buffer", "grad_avg"),
    squares=("square_avg",),
    relative={"grad_avg": "square_avg"},
)


def _lion(p, g, exp_avg, lr, beta1, one_minus_beta1, beta2, one_minus_beta2):
    direction = sign(beta1 * exp_avg + one_minus_beta1 * g)
    return p - lr * direction, beta2 * exp_avg + one_minus_beta2 * g


def _lion_coefficients(step, lr, beta1, beta2):
    return lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2


#: Lion (Chen et al. 2023, Algorithm 2): the sign of one average of gradients, while another is kept.
lion = Rule(_lion, _lion_coefficients, states=("exp_avg",))


# --- others --------------------------------------------------------------------------------------------------------------


def _averaged_descent(p, g, ax, eta, decay, mu, follows):
    p = p - decay * p - eta * g
    # While the average only follows it is the parameter itself, to the last bit.
    return p, where(nonzero(follows), p, ax + mu * (p - ax))


def _averaged_descent_coefficients(step, eta, mu, lr, lambd, alpha, t0):
    follows = where(mu == 1.0, 1.0, 0.0)
    # For the next step, from this step's learning rate, as torch does.
    next_eta = lr / power(1.0 + lambd * lr * step, alpha)
    next_mu = 1.0 / maximum(step - t0, 1.0)
    return eta, lambd * eta, mu, follows, next_eta, next_mu


#: Averaged stochastic gradient descent (Polyak and Juditsky 1992), with the step sizes of Bottou's ``sgd2``.
averaged_descent = Rule(_averaged_descent, _averaged_descent_coefficients, states=("ax",), scalars=("eta", "mu"), precise=("ax",))


def _rprop(p, g, prev, step_size, etaminus, etaplus, step_size_min, step_size_max, zero):
    turn = g * prev
    step_size = where(turn > zero, step_size * etaplus, where(turn < zero, step_size * etaminus, step_size))
    step_size = where(step_size < step_size_min, step_size_min, step_size)
    step_size = where(step_size > step_size_max, step_size_max, step_size)
    # A gradient that has turned is passed over once, and forgotten.
    g = where(turn < zero, zero, g)
    return p - where(g > zero, step_size, where(g < zero, zero - step_size, zero)), g, step_size


def _rprop_coefficients(step, etaminus, etaplus, step_size_min, step_size_max):
    return etaminus, etaplus, step_size_min, step_size_max, 0.0


#: Rprop (Riedmiller and Braun 1993), in the form that forgets a turned gradient (Igel and Huesken 2000, iRprop-).
rprop = Rule(_rprop, _rprop_coefficients, states=("prev", "step_size"), nonnegative=("step_size",))


# --- averages of the parameters: what happens after the rule ---------------------------------------------------------------


def _weight_average(p, ema, weight, follows):
    # At the first step it is the parameter itself, to the last bit.
    return (where(nonzero(follows), p, ema + weight * (p - ema)),)


def _weight_average_coefficients(step, ema_decay):
    return 1.0 - ema_decay, where(step == 1, 1.0, 0.0)


#: An exponential average of the parameters: ``ema_decay ema + (1 - ema_decay) p`` (Polyak and Juditsky 1992; Tarvainen and
#: Valpola 2017), p itself at the first step, as torch.optim.swa_utils.AveragedModel.
weight_average = Average(_weight_average, _weight_average_coefficients, states=("ema",))
