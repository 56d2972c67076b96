"""Measures of heads: arrays in, arrays out; they know no model."""
