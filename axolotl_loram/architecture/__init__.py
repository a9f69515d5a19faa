"""What a model is made of: families as data, configs, plans, records, what belongs together."""
