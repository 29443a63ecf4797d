//! The two ends of a language network: the table of words, and the head.
use super::{Shard, State, slice};
use graphs::{Format, Node, NodeId, Op, OwnIds, Split, Weight};
use std::ops::Range;

/// One rank's words.
struct Words {
    /// Equally many on each rank, so the last one repeats some of the one before where that does not come out even.
    held: Range<usize>,
    /// Those that no rank before has.
    own: Range<usize>,
    /// Words that the last rank repeats.
    repeated: usize,
}

impl Shard<'_> {
    fn words(&self, words: usize, step: usize) -> Result<Words, String> {
        let count = words.div_ceil(self.ranks).next_multiple_of(step);
        if words <= count * (self.ranks - 1) {
            return Err(format!("its {words} words are too few for {} ranks", self.ranks));
        }
        let start = (self.rank * count).min(words - count);
        let own = self.rank * count..((self.rank + 1) * count).min(words);
        Ok(Words { held: start..start + count, own, repeated: count * self.ranks - words })
    }

    /// The table gives zeros for ids of other ranks, so that the ranks add up to the whole; ids past its end, which pictures
    /// have, are zeros everywhere.
    pub(super) fn table(&self, weight: &Weight) -> Result<(Op, State), String> {
        let Words { held, own, .. } = self.words(weight.shape().first().copied().unwrap_or(0), 1)?;
        let ids = OwnIds { first: own.start, end: own.end, row: own.start - held.start };
        let table = Op::Embed { weight: slice(0, &held, weight), split: Split::Vocab, own: Some(ids) };
        Ok((table, State::Sum))
    }

    /// What was gathered of the head is cut to the words in their order.
    pub(super) fn head(&mut self, node: &Node, weight: &Weight, inputs: Vec<NodeId>) -> Result<NodeId, String> {
        let step = if matches!(weight.format(), Some(Format::Int4 { .. })) { 2 } else { 1 };
        let Words { held, repeated, .. } = self.words(weight.shape().first().copied().unwrap_or(0), step)?;
        self.check_cut(weight, 0, &held)?;
        let count = held.len();
        let own = self.push(node, Op::Linear { weight: slice(0, &held, weight), split: Split::Vocab }, inputs)?;
        let path = |part: &str| format!("{}/{part}", node.path);
        let all = self.push_as(path("all_gather"), Op::AllGather { ranks: self.ranks }, vec![own])?;
        let axis = node.ty.shape.len().saturating_sub(1);
        if repeated == 0 {
            return Ok(all);
        }
        let others = Op::Slice { axis, start: 0, end: count * (self.ranks - 1) };
        let last = Op::Slice { axis, start: count * (self.ranks - 1) + repeated, end: count * self.ranks };
        let others = self.push_as(path("others"), others, vec![all])?;
        let last = self.push_as(path("last"), last, vec![all])?;
        self.push_as(path("words"), Op::Concat { axis }, vec![others, last])
    }
}
