//! Matrix products, and what belongs to them where they are quantized.
use super::{Shard, State, slice};
use graphs::{Format, Node, NodeId, Op, Split, Weight};
use std::ops::Range;

impl Shard<'_> {
    /// All but the head.
    pub(super) fn linear(
        &self,
        id: NodeId,
        weight: &Weight,
        split: Split,
        input: State,
    ) -> Result<(Op, State), String> {
        let of = |weight| Op::Linear { weight, split };
        match (split, input) {
            (Split::Column, State::Whole) => {
                let range = self.outputs_of(id, weight.shape().first().copied().unwrap_or(0))?;
                self.check_cut(weight, 0, &range)?;
                Ok((of(slice(0, &range, weight)), State::Part(range)))
            }
            (Split::Row, State::Part(range)) => {
                self.check_cut(weight, 1, &range)?;
                Ok((of(slice(1, &range, weight)), State::Sum))
            }
            (Split::Groups, State::Part(range)) => {
                let [groups, inputs] = weight.shape()[..] else { return Err("its weight is no matrix".into()) };
                let size = inputs / groups.max(1);
                self.check_groups(&range, size, "the group of its sums")?;
                let rows = range.start / size..range.end.div_ceil(size);
                Ok((of(slice(0, &rows, &slice(1, &range, weight))), State::Part(rows)))
            }
            (_, State::Whole) => Ok((of(weight.clone()), State::Whole)),
            _ => Err("it reads a divided tensor, which it cannot work on".into()),
        }
    }

    /// The outputs of a column layer that this rank has.
    fn outputs_of(&self, id: NodeId, outputs: usize) -> Result<Range<usize>, String> {
        match self.keys.get(&id) {
            Some(&(heads, dim)) => self.key_heads(heads).map(|part| part.start * dim..part.end * dim),
            None => self.part(outputs, "outputs"),
        }
    }

    /// Whether a quantized matrix can be cut there: between groups or within one, and between bytes.
    pub(super) fn check_cut(&self, weight: &Weight, axis: usize, range: &Range<usize>) -> Result<(), String> {
        match (weight.format(), axis) {
            (Some(Format::Int4 { group }), 1) => self.check_groups(range, group, "the group of its INT4 weights"),
            (Some(Format::Int4 { .. }), _) if !range.start.is_multiple_of(2) || !range.end.is_multiple_of(2) => {
                Err(format!(
                    "{} of {} ranks is no multiple of 2, the two outputs of a byte of INT4",
                    range.len(),
                    self.ranks
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_groups(&self, range: &Range<usize>, group: usize, what: &str) -> Result<(), String> {
        match graphs::group_of_part(range.start, range.end, group) {
            Some(_) => Ok(()),
            None => {
                // Sizes that recipes take.
                let fits = |size: &usize| range.start.is_multiple_of(*size) && range.end.is_multiple_of(*size);
                let other = [64, 32, 16].into_iter().find(fits).filter(|size| *size < group);
                let other = other.map(|size| format!("; groups of {size} are")).unwrap_or_default();
                Err(format!("{} of {} ranks is no multiple of {group}, {what}{other}", range.len(), self.ranks))
            }
        }
    }

    /// Inputs of a row layer, rounded by the largest magnitude that any rank has of a token.
    pub(super) fn rounded_tokens(&mut self, node: &Node, mut inputs: Vec<NodeId>) -> Result<NodeId, String> {
        let largest = Op::Largest { rank: self.rank, ranks: self.ranks };
        let own = self.push_as(format!("{}/largest", node.path), largest, inputs.clone())?;
        let path = format!("{}/largest/all_reduce", node.path);
        inputs.push(self.push_as(path, Op::AllReduce { ranks: self.ranks }, vec![own])?);
        self.push(node, node.op.clone(), inputs)
    }
}
