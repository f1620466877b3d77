"""Several properties at once: fixed and scheduled strengths beside dynamic ones.

asked       what the user's file says: properties, combinations, what to try
comparison  what the command is asked to do, and what decides the texts
candidates  the doses of each method, and their texts
choosing    one set of strengths and options per method, on the combinations that are seen
judging     shares of the texts with each property, and with all of them
dppl        perplexity against the model's own answers to prompts with demonstrations
measuring   the figures of a row; curves: strengths over tokens
comparing   all of it in order; each part resumes
report, plot
"""
