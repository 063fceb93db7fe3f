"""The same results as the plain code one floor up, many times faster: skip it at first reading."""
