"""Tasks of lm-evaluation-harness (EleutherAI), run on a sharded, masked model.

Documents, prompts, few-shot examples, filters and metrics are the harness's own. Its evaluation loop is not used:
requests are made once for all variants, and their likelihoods come from one pass through the model.

loading: finds, checks and loads tasks
encoder: turns the harness's requests into tokens
requests: requests as tokens, and their responses from a pipeline
task: the loaded tasks as a pipeline task, and their metrics per document
isolation: seeds as the harness does, and keeps its output from the terminal
"""
