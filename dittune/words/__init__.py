"""What a picture owes to words: their tokens, their maps, losses on maps and steps along them."""
