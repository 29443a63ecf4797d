//! One rank's part of a network for tensor parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053): heads and hidden
//! features are divided, and added up where the layers say `row`.
//!
//! Column layers keep a part of their outputs, row layers the same part of their inputs and an all-reduce behind; the head
//! keeps a part of the words, gathered afterwards; everything between works on the part. Quantized matrices are cut after
//! they were quantized as a whole. Embeddings and norms are on every rank. With fewer key/value heads than ranks some ranks
//! have the same one.
use super::{PassError, Passed, Plan};
use graphs::{Attention, Network, Node, NodeId, Op, RelativeBias, Split, Type, Weight};
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) fn shard(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let ranks = plan.ranks;
    if ranks == 1 || passed.network.name == "vision" {
        return Ok(passed);
    }
    let network = &passed.network;
    passed.network = divide(network, plan.rank, ranks).map_err(|(path, reason)| {
        let possible = (1..=LARGEST).filter(|&ranks| ranks == 1 || divide(network, 0, ranks).is_ok()).collect();
        PassError::Shard { path, ranks, reason, possible }
    })?;
    Ok(passed)
}

/// The largest number of ranks that an error suggests.
const LARGEST: usize = 64;

/// A node's path and what is wrong with it.
type Fault = (String, String);

/// Which of the last axis's features a value has: none missing, or a part of them.
#[derive(Clone, Debug, PartialEq)]
enum State {
    Whole,
    Part(Range<usize>),
}

struct Shard<'n> {
    network: &'n Network,
    rank: usize,
    ranks: usize,
    nodes: Vec<Node>,
    /// For each node of the whole network: its node here, and how much of it that is.
    places: Vec<(NodeId, State)>,
    /// Linear layers (and inputs) that give keys or values: heads, and dimensions of each.
    keys: BTreeMap<NodeId, (usize, usize)>,
}

fn divide(network: &Network, rank: usize, ranks: usize) -> Result<Network, Fault> {
    let (keys, places, nodes) = (key_layers(network), Vec::new(), Vec::new());
    let mut shard = Shard { network, rank, ranks, nodes, places, keys };
    for (place, node) in network.nodes.iter().enumerate() {
        let found = shard.node(NodeId(place), node).map_err(|reason| (node.path.clone(), reason))?;
        shard.places.push(found);
    }
    let mut outputs = Vec::new();
    for (name, id) in &network.outputs {
        let (place, state) = &shard.places[id.0];
        // What the other networks of this rank read, divided alike, or what somebody marked.
        if *state != State::Whole && *name == "logits" {
            return Err((network.nodes[id.0].path.clone(), "the logits are divided".into()));
        }
        outputs.push((name.clone(), *place));
    }
    Ok(Network { name: network.name.clone(), dtype: network.dtype, nodes: shard.nodes, outputs })
}

/// The layers behind the keys and values of all attention.
fn key_layers(network: &Network) -> BTreeMap<NodeId, (usize, usize)> {
    let mut keys = BTreeMap::new();
    for node in &network.nodes {
        let Op::Attention(Attention { kv_heads, head_dim, .. }) = &node.op else { continue };
        for mut id in node.inputs[1..3].iter().copied() {
            while let Op::BiasAdd { .. } | Op::Scale { .. } = network.nodes[id.0].op {
                id = network.nodes[id.0].inputs[0];
            }
            keys.insert(id, (*kv_heads, *head_dim));
        }
    }
    keys
}

fn slice(axis: usize, range: &Range<usize>, of: &Weight) -> Weight {
    Weight::Slice { axis, start: range.start, end: range.end, of: Box::new(of.clone()) }
}

impl Shard<'_> {
    fn node(&mut self, id: NodeId, node: &Node) -> Result<(NodeId, State), String> {
        let inputs: Vec<NodeId> = node.inputs.iter().map(|input| self.places[input.0].0).collect();
        let states: Vec<&State> = node.inputs.iter().map(|input| &self.places[input.0].1).collect();
        let first = states.first().copied().cloned().unwrap_or(State::Whole);
        let whole = || match states.iter().all(|state| **state == State::Whole) {
            true => Ok(State::Whole),
            false => Err("it reads a divided tensor, which it cannot work on".to_owned()),
        };
        let (op, state) = match &node.op {
            Op::Input => match self.keys.get(&id) {
                Some(&(heads, dim)) => return self.divided_input(node, heads, dim),
                None => (Op::Input, State::Whole),
            },
            Op::Linear { weight, split: Split::Column } => {
                whole()?;
                let range = self.outputs_of(id, weight.shape().first().copied().unwrap_or(0))?;
                self.check_cut(weight, 0, &range)?;
                (Op::Linear { weight: slice(0, &range, weight), split: Split::Column }, State::Part(range))
            }
            Op::Linear { weight, split: Split::Row } if first != State::Whole => {
                let State::Part(range) = first else { return Err("it reads nothing".into()) };
                self.check_cut(weight, 1, &range)?;
                let op = Op::Linear { weight: slice(1, &range, weight), split: Split::Row };
                let part = self.push(node, op, inputs)?;
                let path = format!("{}/all_reduce", node.path);
                let sum = self.push_as(path, Op::AllReduce { ranks: self.ranks }, vec![part])?;
                return Ok((sum, State::Whole));
            }
            Op::Linear { weight, split: Split::Vocab } => {
                whole()?;
                let words = self.words(node, weight, inputs)?;
                return Ok((words, State::Whole));
            }
            Op::BiasAdd { weight } => match &first {
                State::Part(range) => {
                    let axis = weight.shape().len().saturating_sub(1);
                    (Op::BiasAdd { weight: slice(axis, range, weight) }, first)
                }
                State::Whole => (node.op.clone(), State::Whole),
            },
            Op::ScaleBy { weight, divide } => match &first {
                State::Part(range) => (Op::ScaleBy { weight: slice(0, range, weight), divide: *divide }, first),
                State::Whole => (node.op.clone(), State::Whole),
            },
            Op::Activation { .. } | Op::Scale { .. } | Op::QuantizeInput { .. } | Op::Cast { .. } | Op::LastToken => {
                (node.op.clone(), first)
            }
            Op::Binary { .. } => match states.iter().all(|state| **state == first) {
                true => (node.op.clone(), first),
                false => return Err("its operands are divided in different ways".into()),
            },
            Op::Attention(attention) => self.attention(attention, &states)?,
            _ => (node.op.clone(), whole()?),
        };
        Ok((self.push(node, op, inputs)?, state))
    }

    /// The outputs of a column layer that this rank has.
    fn outputs_of(&self, id: NodeId, outputs: usize) -> Result<Range<usize>, String> {
        match self.keys.get(&id) {
            Some(&(heads, dim)) => self.key_heads(heads).map(|part| part.start * dim..part.end * dim),
            None => self.part(outputs, "outputs"),
        }
    }

    /// This rank's key/value heads: a part of them, or with fewer heads than ranks one, which others have too.
    fn key_heads(&self, heads: usize) -> Result<Range<usize>, String> {
        if heads >= self.ranks {
            return self.part(heads, "key/value heads");
        }
        if !self.ranks.is_multiple_of(heads.max(1)) {
            return Err(format!("its {heads} key/value heads are not shared alike by {} ranks", self.ranks));
        }
        let head = self.rank * heads / self.ranks;
        Ok(head..head + 1)
    }

    fn part(&self, size: usize, what: &str) -> Result<Range<usize>, String> {
        if !size.is_multiple_of(self.ranks) || size == 0 {
            return Err(format!("its {size} {what} do not divide by {} ranks", self.ranks));
        }
        let part = size / self.ranks;
        Ok(self.rank * part..(self.rank + 1) * part)
    }

    /// Whether a quantized matrix can be cut there: between groups, and between bytes.
    fn check_cut(&self, weight: &Weight, axis: usize, range: &Range<usize>) -> Result<(), String> {
        let (step, what) = match (weight.format(), axis) {
            (Some(graphs::Format::Int4 { group }), 1) => (group, "the group of its INT4 weights"),
            (Some(graphs::Format::Int4 { .. }), _) => (2, "the two outputs of a byte of INT4"),
            _ => return Ok(()),
        };
        match range.start.is_multiple_of(step) && range.end.is_multiple_of(step) {
            true => Ok(()),
            false => Err(format!("{} of {} ranks is no multiple of {step}, {what}", range.len(), self.ranks)),
        }
    }

    fn attention(&self, attention: &Attention, states: &[&State]) -> Result<(Op, State), String> {
        let heads = self.part(attention.heads, "heads")?;
        let key_heads = self.key_heads(attention.kv_heads)?;
        let divided = |state: &&State| matches!(state, State::Part(_));
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
    fn divided_input(&mut self, node: &Node, heads: usize, dim: usize) -> Result<(NodeId, State), String> {
        let part = self.key_heads(heads)?;
        let mut ty = node.ty.clone();
        if let Some(last) = ty.shape.last_mut() {
            *last = (part.len() * dim).into();
        }
        self.nodes.push(Node { ty, ..node.clone() });
        Ok((NodeId(self.nodes.len() - 1), State::Part(part.start * dim..part.end * dim)))
    }

    /// The head: equally many words for each rank, so the last one repeats some where that does not come out even; what was
    /// gathered is cut to the words in their order.
    fn words(&mut self, node: &Node, weight: &Weight, inputs: Vec<NodeId>) -> Result<NodeId, String> {
        let words = weight.shape().first().copied().unwrap_or(0);
        let count = words.div_ceil(self.ranks);
        if words < count * (self.ranks - 1) || count == 0 {
            return Err(format!("its {words} words are too few for {} ranks", self.ranks));
        }
        let start = (self.rank * count).min(words - count);
        let range = start..start + count;
        self.check_cut(weight, 0, &range)?;
        let own = self.push(node, Op::Linear { weight: slice(0, &range, weight), split: Split::Vocab }, inputs)?;
        let path = |part: &str| format!("{}/{part}", node.path);
        let all = self.push_as(path("all_gather"), Op::AllGather { ranks: self.ranks }, vec![own])?;
        let (axis, repeated) = (node.ty.shape.len().saturating_sub(1), count * self.ranks - words);
        if repeated == 0 {
            return Ok(all);
        }
        let others = Op::Slice { axis, start: 0, end: count * (self.ranks - 1) };
        let last = Op::Slice { axis, start: count * (self.ranks - 1) + repeated, end: count * self.ranks };
        let others = self.push_as(path("others"), others, vec![all])?;
        let last = self.push_as(path("last"), last, vec![all])?;
        self.push_as(path("words"), Op::Concat { axis }, vec![others, last])
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
mod tests {
    use super::super::{PassError, Plan, run};
    use graphs::{DType, Logits, Model, Network, Op, Weight};
    use proptest::prelude::*;
    use quant::Recipe;
    use serde_json::{Value, json};

    fn network(changes: Value) -> Network {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 449, "max_position_embeddings": 128,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap().remove(0)
    }

    fn divided(network: Network, recipe: &str, rank: usize, ranks: usize) -> Result<Network, PassError> {
        let recipe = Recipe::preset(recipe).unwrap();
        Ok(run(network, &Plan { rank, ranks, ..Plan::new(&recipe) })?.network)
    }

    #[test]
    fn before_and_after() {
        let lines = |network: &Network| {
            let text = graphs::print(network);
            let lines = text.lines().filter(|line| line.contains(" model.layers.1.") || line.contains("lm_head"));
            lines.map(str::to_owned).collect::<Vec<_>>().join("\n")
        };
        insta::assert_snapshot!("before", lines(&network(json!({}))));
        insta::assert_snapshot!("after", lines(&divided(network(json!({})), "int8", 3, 4).unwrap()));
    }

    #[test]
    fn what_does_not_divide_is_refused_with_what_does() {
        for (changes, recipe, ranks, wanted, possible) in [
            (json!({}), "none", 3, "its 64 outputs do not divide by 3 ranks", "1, 2, 4, 8"),
            (json!({ "num_attention_heads": 4, "num_key_value_heads": 1 }), "none", 8, "its 4 heads do not", "1, 2, 4"),
            (
                json!({ "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16 }),
                "none",
                2,
                "its 3 key/value heads do not",
                "1, 3, 6",
            ),
            (json!({}), "int4-g32", 2, "48 of 2 ranks is no multiple of 32, the group of its INT4 weights", "1"),
            (json!({ "vocab_size": 5 }), "none", 4, "its 5 words are too few for 4 ranks", "1, 2"),
        ] {
            let error = divided(network(changes), recipe, 0, ranks).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
            assert_eq!(error.hint().unwrap(), format!("--tp may be {possible}"));
        }
    }

    /// How often each element of every matrix is on some rank.
    fn counts(network: &Network, parts: &[Network]) -> Vec<(String, Vec<usize>)> {
        let matrix = |node: &graphs::Node| match &node.op {
            Op::Linear { weight, .. } => Some((node.path.clone(), weight.clone())),
            _ => None,
        };
        let of = |network: &Network| network.nodes.iter().filter_map(matrix).collect::<Vec<_>>();
        let parts: Vec<_> = parts.iter().map(of).collect();
        let count = |(place, (path, weight)): (usize, (String, Weight))| {
            let [rows, columns] = weight.shape()[..] else { panic!("a matrix") };
            let mut counts = vec![0; rows * columns];
            for part in &parts {
                let (axis, start, end) = match &part[place].1 {
                    Weight::Slice { axis, start, end, .. } => (*axis, *start, *end),
                    _ => (0, 0, rows),
                };
                for (at, count) in counts.iter_mut().enumerate() {
                    let index = if axis == 0 { at / columns } else { at % columns };
                    *count += usize::from((start..end).contains(&index));
                }
            }
            (path, counts)
        };
        of(network).into_iter().enumerate().map(count).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        /// Each weight is on one rank; those of shared key/value heads on as many as share them; words of the head at the
        /// seam of the last two ranks on both.
        #[test]
        fn every_weight_is_somewhere(ranks in prop::sample::select(vec![1usize, 2, 4, 8]), kv in prop::sample::select(vec![1usize, 2, 4, 8]), vocab in 64usize..500) {
            let whole = network(json!({ "num_key_value_heads": kv, "vocab_size": vocab }));
            let parts: Vec<Network> = (0..ranks).map(|rank| divided(whole.clone(), "none", rank, ranks).unwrap()).collect();
            for (path, counts) in counts(&whole, &parts) {
                let shared = if path.ends_with("k_proj") || path.ends_with("v_proj") { (ranks / kv).max(1) } else { 1 };
                if path == "lm_head" && ranks > 1 {
                    let twice = counts.iter().filter(|count| **count == 2).count() / 64;
                    prop_assert_eq!(twice, vocab.div_ceil(ranks) * ranks - vocab);
                    prop_assert!(counts.iter().all(|count| [1, 2].contains(count)));
                } else {
                    prop_assert!(counts.iter().all(|count| *count == shared), "{}", path);
                }
            }
        }
    }
}
