//! Which token follows where a checkpoint's generation config wants another than the likeliest.
use super::{Executor, RuntimeError};
use crate::lower::LOGITS;
use crate::processor::TokenRules;

/// The rules for one batch. Places count new tokens from 0.
pub(super) struct Choice<'r> {
    rules: &'r TokenRules,
    first: Option<u32>,
    last_place: usize,
}

impl<'r> Choice<'r> {
    /// `read` is how many tokens the decoder has read before the first new one, of the longest request.
    pub(super) fn new(rules: &'r TokenRules, read: usize, max_new_tokens: usize) -> Choice<'r> {
        let first = rules.forced_first.filter(|_| read == 1);
        Choice { rules, first, last_place: max_new_tokens.saturating_sub(1) }
    }

    /// Whether the token at `place` cannot be left to the target, which takes the likeliest.
    pub(super) fn is_own(&self, place: usize) -> bool {
        (place == 0 && self.first.is_some()) || self.suppressed(place).next().is_some()
    }

    /// The token that ends an answer of all places in the place of the one that was made.
    pub(super) fn last(&self, place: usize) -> Option<u32> {
        self.rules.forced_last.filter(|_| place == self.last_place)
    }

    /// A token forced at the beginning is read like one that was given.
    fn suppressed(&self, place: usize) -> impl Iterator<Item = u32> {
        let begins = place == usize::from(self.first.is_some());
        let first = self.rules.suppressed_first.iter().filter(move |_| begins);
        self.rules.suppressed.iter().chain(first).copied()
    }

    /// The tokens of all requests at `place`, where the target has just made `likeliest`; it goes on with those chosen.
    ///
    /// # Errors
    /// A failure of the engine.
    pub(super) fn choose(
        &self,
        executor: &mut dyn Executor,
        place: usize,
        likeliest: Vec<u32>,
    ) -> Result<Vec<u32>, RuntimeError> {
        if !self.is_own(place) {
            return Ok(likeliest);
        }
        let chosen = match self.first {
            Some(id) if place == 0 => vec![id; likeliest.len()],
            _ => {
                let mut logits = executor.outputs()?.remove(LOGITS).ok_or_else(no_logits)?;
                let width = logits.shape.last().copied().unwrap_or(0);
                for row in logits.values.chunks_exact_mut(width.max(1)) {
                    for id in self.suppressed(place) {
                        *row.get_mut(id as usize).ok_or_else(no_logits)? = f32::NEG_INFINITY;
                    }
                }
                best(&logits.values, width)
            }
        };
        executor.force(&chosen)?;
        Ok(chosen)
    }
}

fn no_logits() -> RuntimeError {
    RuntimeError::Inconsistent { what: "language network".into() }
}

/// The largest logit of each row; the first of equals, as PyTorch's argmax.
pub(super) fn best(logits: &[f32], width: usize) -> Vec<u32> {
    let row = |row: &[f32]| {
        let start = (0, f32::NEG_INFINITY);
        row.iter().enumerate().fold(start, |best, (id, &value)| if value > best.1 { (id, value) } else { best }).0
            as u32
    };
    logits.chunks_exact(width.max(1)).map(row).collect()
}
