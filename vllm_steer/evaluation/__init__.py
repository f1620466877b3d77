"""What steers do to text: generation under settings, judges, and the figures that follow.

A judge reads ``Answers`` and gives figures by name; ``judges`` makes one from its spec.
"""
