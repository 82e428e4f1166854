"""Learning rate and batch size over a run, as plain functions of the step and the tokens seen."""

from fulmen.train.recipe import ScheduleSection, TokenScheduleSection


def learning_rate_factor(schedule: ScheduleSection, step: int) -> float:
    """Learning rate of a step (from 0) over the highest: warm-up, stable, decay (MiniMax-01, section 4.2).

    Linear from 1/warmup to 1 over `warmup` steps, 1 until `decay` steps before the end, then exponentially (or
    linearly) down to `final` at the last step.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    decayed = step - (schedule.steps - schedule.decay) + 1
    if decayed <= 0:
        return 1.0
    share = min(1.0, decayed / schedule.decay)
    if schedule.decay_shape == "linear":
        return 1 + (schedule.final - 1) * share
    return schedule.final**share


def batch_tokens(schedule: TokenScheduleSection, tokens_seen: int) -> int:
    """Tokens of the next batch: the ramp's last entry whose tokens have been seen (MiniMax-01, section 4.2)."""
    reached = [tokens for seen, tokens in schedule.ramp if tokens_seen >= seen]
    return reached[-1] if reached else schedule.batch_tokens
