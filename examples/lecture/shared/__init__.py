"""What the topics share: data, tiny networks, training, plotting."""
