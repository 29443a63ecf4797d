//! Heads of attention, and the layers that give keys and values.
use super::{Shard, State, slice};
use graphs::{Attention, BinaryKind, Network, Node, NodeId, Op, RelativeBias};
use std::collections::BTreeMap;
use std::ops::Range;

/// The layers behind the keys and values of all attention.
pub(super) fn key_layers(network: &Network) -> BTreeMap<NodeId, (usize, usize)> {
    let mut keys = BTreeMap::new();
    for node in &network.nodes {
        let Op::Attention(Attention { kv_heads, head_dim, .. }) = &node.op else { continue };
        let mut ids: Vec<NodeId> = node.inputs[1..3].to_vec();
        while let Some(id) = ids.pop() {
            let Node { op, inputs, .. } = &network.nodes[id.0];
            match op {
                Op::BiasAdd { .. } | Op::Scale { .. } | Op::Binary { kind: BinaryKind::Add } => ids.extend(inputs),
                _ => drop(keys.insert(id, (*kv_heads, *head_dim))),
            }
        }
    }
    keys
}

impl Shard<'_> {
    /// This rank's key/value heads: a part of them, or with fewer heads than ranks one, which others have too.
    pub(super) fn key_heads(&self, heads: usize) -> Result<Range<usize>, String> {
        if heads >= self.ranks {
            return self.part(heads, "key/value heads");
        }
        if !self.ranks.is_multiple_of(heads.max(1)) {
            return Err(format!("its {heads} key/value heads are not shared alike by {} ranks", self.ranks));
        }
        let head = self.rank * heads / self.ranks;
        Ok(head..head + 1)
    }

    pub(super) fn attention(&self, attention: &Attention, states: &[State]) -> Result<(Op, State), String> {
        let heads = self.part(attention.heads, "heads")?;
        let key_heads = self.key_heads(attention.kv_heads)?;
        let divided = |state: &State| matches!(state, State::Part(_));
        if !states[..3].iter().all(divided) {
            return Err("its query, keys and values are not all divided".into());
        }
        let dim = attention.head_dim;
        let features = heads.start * dim..heads.end * dim;
        let relative_bias = attention
            .relative_bias
            .as_ref()
            .map(|bias| RelativeBias { weight: slice(1, &heads, &bias.weight), ..bias.clone() });
        let part = Attention { heads: heads.len(), kv_heads: key_heads.len(), relative_bias, ..attention.clone() };
        Ok((Op::Attention(part), State::Part(features)))
    }

    /// Keys or values that come from another network of this rank.
    pub(super) fn divided_input(&mut self, node: &Node, heads: usize, dim: usize) -> Result<(NodeId, State), String> {
        let part = self.key_heads(heads)?;
        let mut ty = node.ty.clone();
        if let Some(last) = ty.shape.last_mut() {
            *last = (part.len() * dim).into();
        }
        self.nodes.push(Node { ty, ..node.clone() });
        Ok((NodeId(self.nodes.len() - 1), State::Part(part.start * dim..part.end * dim)))
    }
}
