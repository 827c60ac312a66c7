"""The demonstration: real pretrained networks and real data, fused by recipes, compared in one table."""
