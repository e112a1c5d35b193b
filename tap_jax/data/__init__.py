"""Reading, drawing, tokenising, dealing out and cutting of data."""
