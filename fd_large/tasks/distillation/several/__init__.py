"""Methods for several teachers: choice of each image's teachers, normalisers, losses, mosaics."""
