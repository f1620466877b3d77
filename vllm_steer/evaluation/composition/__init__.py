"""Comparison of steering methods for several properties at once, behind ``vllm-steer compare``.

spec            the file of properties and combinations
settings        the settings of a comparison, and the metadata of its run
candidates      the doses that each method tries, and the text sets they generate
selection       one set of strengths and options per method, selected on the seen combinations
property_judges shares of texts with each property, and with all of them
dppl            perplexity relative to the model's own answers to prompts with demonstrations
measurement     the figures of one row; curves: strengths over tokens
comparison_run  the whole comparison; every stage can be resumed
report, plot    tables and figures
"""
