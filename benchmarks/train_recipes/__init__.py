"""Which training recipe gives the most tokens a step? One distillation, several recipes, one table."""
