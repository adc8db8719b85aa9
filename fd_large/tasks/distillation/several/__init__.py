"""Several teachers: the choice of each image's teachers, running statistics, losses and mosaics."""
