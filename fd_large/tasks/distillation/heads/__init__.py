"""What maps a student's tokens to a teacher's width, trained and then thrown away."""
