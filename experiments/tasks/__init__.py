"""Black boxes and their prompts: haiku, sentiment, film reviews, the gold score."""
