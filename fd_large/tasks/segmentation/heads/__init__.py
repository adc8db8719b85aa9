"""Heads that predict the class of each pixel from maps: UPerNet, convolutional and linear."""
