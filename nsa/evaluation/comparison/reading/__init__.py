"""What reads the results of a comparison and makes none: a better report of the same results is no other result."""
