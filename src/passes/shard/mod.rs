//! One rank's part of a network for tensor parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053): heads and hidden
//! features are divided, and added up where the layers say `row`.
//!
//! Column layers keep a part of their outputs, row layers the same part of their inputs and an all-reduce behind; table and
//! head keep a part of the words, added up or gathered afterwards; everything between works on the part. Quantized matrices
//! are cut after they were quantized as a whole. Norms and positions are on every rank. With fewer key/value heads than
//! ranks some ranks have the same one.
mod heads;
mod linear;
mod words;

use super::{PassError, Passed, Plan};
use graphs::{Network, Node, NodeId, Op, Type, Weight};
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) fn shard(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let ranks = plan.ranks;
    if ranks == 1 || passed.network.name == "vision" {
        return Ok(passed);
    }
    let network = &passed.network;
    let divide = |rank, ranks| divide(network, rank, ranks, plan.divide_embedding);
    passed.network = divide(plan.rank, ranks).map_err(|(path, reason)| {
        // Ranks differ where groups are cut.
        let divides = |ranks: &usize| *ranks == 1 || (0..*ranks).all(|rank| divide(rank, *ranks).is_ok());
        let possible = (1..=LARGEST).filter(divides).collect();
        PassError::Shard { path, ranks, reason, possible }
    })?;
    Ok(passed)
}

/// The largest number of ranks that an error suggests.
const LARGEST: usize = 64;

/// A node's path and what is wrong with it.
type Fault = (String, String);

/// What this rank has of a value.
#[derive(Clone, Debug, PartialEq)]
enum State {
    Whole,
    /// Some of the last axis's features.
    Part(Range<usize>),
    /// One of as many summands as there are ranks.
    Sum,
}

struct Shard<'n> {
    network: &'n Network,
    rank: usize,
    ranks: usize,
    /// The table of words is divided too.
    divide_embedding: bool,
    nodes: Vec<Node>,
    /// For each node of the whole network: its node here, and how much of it that is.
    places: Vec<(NodeId, State)>,
    /// Linear layers (and inputs) that give keys or values: heads, and dimensions of each.
    keys: BTreeMap<NodeId, (usize, usize)>,
}

fn divide(network: &Network, rank: usize, ranks: usize, divide_embedding: bool) -> Result<Network, Fault> {
    let (keys, places, nodes) = (heads::key_layers(network), Vec::new(), Vec::new());
    let mut shard = Shard { network, rank, ranks, divide_embedding, nodes, places, keys };
    let at = |id: NodeId| move |reason| (network.nodes[id.0].path.clone(), reason);
    for (place, node) in network.nodes.iter().enumerate() {
        let found = shard.node(NodeId(place), node).map_err(at(NodeId(place)))?;
        shard.places.push(found);
    }
    let mut outputs = Vec::new();
    for (name, id) in &network.outputs {
        shard.settle(*id).map_err(at(*id))?;
        let (place, state) = &shard.places[id.0];
        // What the other networks of this rank read, divided alike, or what somebody marked.
        if *state != State::Whole && *name == "logits" {
            return Err((network.nodes[id.0].path.clone(), "the logits are divided".into()));
        }
        outputs.push((name.clone(), *place));
    }
    Ok(Network { name: network.name.clone(), dtype: network.dtype, nodes: shard.nodes, outputs })
}

fn slice(axis: usize, range: &Range<usize>, of: &Weight) -> Weight {
    Weight::Slice { axis, start: range.start, end: range.end, of: Box::new(of.clone()) }
}

impl Shard<'_> {
    fn node(&mut self, id: NodeId, node: &Node) -> Result<(NodeId, State), String> {
        // Summands are added to summands before the ranks are joined: that is one all-reduce in the place of two.
        let summands = node.inputs.iter().all(|input| self.places[input.0].1 == State::Sum);
        if matches!(node.op, Op::Binary { kind: graphs::BinaryKind::Add }) && summands {
            let inputs = node.inputs.iter().map(|input| self.places[input.0].0).collect();
            return Ok((self.push(node, node.op.clone(), inputs)?, State::Sum));
        }
        node.inputs.iter().try_for_each(|input| self.settle(*input))?;
        let inputs: Vec<NodeId> = node.inputs.iter().map(|input| self.places[input.0].0).collect();
        let states: Vec<State> = node.inputs.iter().map(|input| self.places[input.0].1.clone()).collect();
        let first = states.first().cloned().unwrap_or(State::Whole);
        let whole = || match states.iter().all(|state| *state == State::Whole) {
            true => Ok(State::Whole),
            false => Err("it reads a divided tensor, which it cannot work on".to_owned()),
        };
        let (op, state) = match &node.op {
            Op::Input => match self.keys.get(&id) {
                Some(&(heads, dim)) => return self.divided_input(node, heads, dim),
                None => (Op::Input, State::Whole),
            },
            Op::Linear { weight, split: graphs::Split::Vocab } => {
                whole()?;
                return Ok((self.head(node, weight, inputs)?, State::Whole));
            }
            Op::Linear { weight, split } => self.linear(id, weight, *split, first)?,
            Op::Embed { weight, split: graphs::Split::Vocab, .. } if self.divide_embedding => {
                whole()?;
                self.table(weight)?
            }
            Op::BiasAdd { weight } => match &first {
                State::Part(range) => {
                    let axis = weight.shape().len().saturating_sub(1);
                    (Op::BiasAdd { weight: slice(axis, range, weight) }, first)
                }
                _ => (node.op.clone(), first),
            },
            Op::ScaleBy { weight, divide } => match &first {
                State::Part(range) => (Op::ScaleBy { weight: slice(0, range, weight), divide: *divide }, first),
                _ => (node.op.clone(), first),
            },
            Op::QuantizeInput { scale: None, .. } if first != State::Whole => {
                return Ok((self.rounded_tokens(node, inputs)?, first));
            }
            Op::Activation { .. } | Op::Scale { .. } | Op::QuantizeInput { .. } | Op::Cast { .. } | Op::LastToken => {
                (node.op.clone(), first)
            }
            Op::Binary { .. } => match states.iter().all(|state| *state == first) {
                true => (node.op.clone(), first),
                false => return Err("its operands are divided in different ways".into()),
            },
            Op::Attention(attention) => self.attention(attention, &states)?,
            _ => (node.op.clone(), whole()?),
        };
        Ok((self.push(node, op, inputs)?, state))
    }

    /// Adds up what the ranks have of a value of the whole network, where that is a summand each.
    fn settle(&mut self, id: NodeId) -> Result<(), String> {
        let (place, state) = self.places[id.0].clone();
        if state == State::Sum {
            let path = format!("{}/all_reduce", self.nodes[place.0].path);
            let sum = self.push_as(path, Op::AllReduce { ranks: self.ranks }, vec![place])?;
            self.places[id.0] = (sum, State::Whole);
        }
        Ok(())
    }

    fn part(&self, size: usize, what: &str) -> Result<Range<usize>, String> {
        if !size.is_multiple_of(self.ranks) || size == 0 {
            return Err(format!("its {size} {what} do not divide by {} ranks", self.ranks));
        }
        let part = size / self.ranks;
        Ok(self.rank * part..(self.rank + 1) * part)
    }

    /// A node in the place of `node`; only inputs keep its type.
    fn push(&mut self, node: &Node, op: Op, inputs: Vec<NodeId>) -> Result<NodeId, String> {
        self.push_typed(node.path.clone(), op, inputs, Some(&node.ty))
    }

    fn push_as(&mut self, path: String, op: Op, inputs: Vec<NodeId>) -> Result<NodeId, String> {
        self.push_typed(path, op, inputs, None)
    }

    fn push_typed(
        &mut self,
        path: String,
        op: Op,
        inputs: Vec<NodeId>,
        declared: Option<&Type>,
    ) -> Result<NodeId, String> {
        let types: Vec<&Type> = inputs.iter().map(|input| &self.nodes[input.0].ty).collect();
        let ty = graphs::infer(&op, &types, declared, self.network.dtype)?;
        self.nodes.push(Node { path, op, inputs, ty });
        Ok(NodeId(self.nodes.len() - 1))
    }
}

#[cfg(test)]
mod tests;
