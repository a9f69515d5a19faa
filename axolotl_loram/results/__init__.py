"""What came out: evaluated, inspected, reported, published."""
