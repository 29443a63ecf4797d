//! Factors between a layer and what is before it (SmoothQuant, AWQ): weights are multiplied by them along their inputs and
//! the inputs divided, in the norm or the layer that makes them where the ops between allow it, else by an op of its own.
//! Also rounds the inputs of W8A8 layers. Only names of vectors are written here; `calibration::search` finds their values.
use super::{PassError, Passed, Plan};
use crate::calibration::{Channels, Wanted};
use graphs::{ActivationKind, BinaryKind, Format, Network, Node, NodeId, Op, Weight};
use quant::Method;
use std::collections::{BTreeMap, HashMap};

/// The layers that read one value and are quantized by one method.
struct Group {
    input: NodeId,
    method: Method,
    members: Vec<(NodeId, Format)>,
}

/// What is divided by the factors in place of the value itself.
#[derive(Clone, Debug, Default, PartialEq)]
struct Fold {
    /// Norms, layers and biases whose outputs are scaled.
    nodes: Vec<NodeId>,
    channels: Channels,
}

/// A node that comes right behind another.
struct Insertion {
    after: NodeId,
    op: Op,
    /// Layers that read it in place of the other.
    readers: Vec<NodeId>,
}

pub(super) fn smooth(mut passed: Passed, _: &Plan<'_>) -> Result<Passed, PassError> {
    let groups = groups(&passed);
    let mut insertions = Vec::new();
    for (number, group) in groups.iter().enumerate() {
        let again = groups[..number].iter().filter(|other| other.input == group.input).count();
        apply(&mut passed, group, again, &mut insertions);
    }
    insert(&mut passed.network, insertions);
    Ok(passed)
}

fn groups(passed: &Passed) -> Vec<Group> {
    let chosen: HashMap<&str, (Method, Format)> = passed
        .assignments
        .iter()
        .filter_map(|choice| Some((choice.path.as_str(), (choice.method, choice.format?))))
        .collect();
    let mut groups: Vec<Group> = Vec::new();
    for (place, node) in passed.network.nodes.iter().enumerate() {
        let (Op::Linear { .. }, Some(&(method, format))) = (&node.op, chosen.get(node.path.as_str())) else { continue };
        if !method.scales_inputs() && method.quantizes_inputs().is_none() {
            continue;
        }
        let (input, member) = (node.inputs[0], (NodeId(place), format));
        match groups.iter_mut().find(|group| group.input == input && group.method == method) {
            Some(group) => group.members.push(member),
            None => groups.push(Group { input, method, members: vec![member] }),
        }
    }
    groups
}

fn apply(passed: &mut Passed, group: &Group, again: usize, insertions: &mut Vec<Insertion>) {
    let network = &mut passed.network;
    let key = format!("{}/{}", network.name, network.nodes[group.input.0].path);
    let name = |kind: &str| if again == 0 { format!("{kind}:{key}") } else { format!("{kind}{again}:{key}") };
    let readers: Vec<NodeId> = group.members.iter().map(|(id, _)| *id).collect();
    let mut factors = None;
    if group.method.scales_inputs() {
        let fold = fold(network, group);
        let weight = |(id, format): &(NodeId, Format)| match &network.nodes[id.0].op {
            Op::Linear { weight, .. } => Some((original(weight).clone(), *format)),
            _ => None,
        };
        let members: Vec<(Weight, Format)> = group.members.iter().filter_map(weight).collect();
        let width = members.first().and_then(|(weight, _)| weight.shape().get(1).copied()).unwrap_or(0);
        let channels = fold.as_ref().map(|fold| fold.channels).unwrap_or_default();
        let vector = Weight::tensor(name("smooth"), &[channels.own(width)]);
        let wide = channels.spread_weight(&vector);
        for id in &readers {
            if let Op::Linear { weight, .. } = &mut network.nodes[id.0].op {
                *weight = scaled(weight, 1, &wide, false);
            }
        }
        match fold {
            Some(fold) => fold.nodes.iter().for_each(|id| divide(&mut network.nodes[id.0].op, &vector)),
            None => insertions.push(Insertion {
                after: group.input,
                op: Op::ScaleBy { weight: vector.clone(), divide: true },
                readers: readers.clone(),
            }),
        }
        passed.wanted.push(Wanted::Factors {
            name: name("smooth"),
            input: key.clone(),
            method: group.method,
            channels,
            width,
            members,
        });
        factors = Some(wide);
    }
    if let Some(per_token) = group.method.quantizes_inputs() {
        let scale = (!per_token).then(|| Weight::tensor(name("range"), &[1]));
        if scale.is_some() {
            let (name, input, factors) = (name("range"), key.clone(), factors.clone());
            passed.wanted.push(Wanted::Range { name, input, factors });
        }
        insertions.push(Insertion {
            after: group.input,
            op: Op::QuantizeInput { scale, wide: false },
            readers: readers.clone(),
        });
    }
    for id in readers {
        passed.inputs.insert(passed.network.nodes[id.0].path.clone(), (key.clone(), factors.clone()));
    }
}

/// A weight before it was scaled.
fn original(weight: &Weight) -> &Weight {
    match weight {
        Weight::Scaled { of, .. } => original(of),
        other => other,
    }
}

fn scaled(of: &Weight, axis: usize, by: &Weight, divide: bool) -> Weight {
    Weight::Scaled { axis, by: Box::new(by.clone()), divide, of: Box::new(of.clone()) }
}

/// Divides what a node gives, channel by channel.
fn divide(op: &mut Op, by: &Weight) {
    match op {
        Op::Norm { weight, bias, .. } => {
            for weight in std::iter::once(weight).chain(bias) {
                *weight = scaled(weight, 0, by, true);
            }
        }
        Op::Linear { weight, .. } | Op::BiasAdd { weight } => *weight = scaled(weight, 0, by, true),
        _ => {}
    }
}

/// Where the factors of a group can go; `None` where they need an op of their own.
fn fold(network: &Network, group: &Group) -> Option<Fold> {
    let mut readers: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    for (place, node) in network.nodes.iter().enumerate() {
        node.inputs.iter().for_each(|input| readers.entry(*input).or_default().push(NodeId(place)));
    }
    let marked = |id: NodeId| network.outputs.iter().any(|(_, output)| *output == id);
    let mut others = readers.get(&group.input)?.iter();
    if marked(group.input) || !others.all(|id| group.members.iter().any(|(member, _)| member == id)) {
        return None;
    }
    let alone = |id: NodeId| !marked(id) && readers.get(&id).is_some_and(|readers| readers.len() == 1);
    walk(network, group.input, &alone)
}

/// Goes up from a value through ops that a positive factor of each channel passes unchanged, as long as nothing else
/// (`alone`) reads what is there.
fn walk(network: &Network, id: NodeId, alone: &dyn Fn(NodeId) -> bool) -> Option<Fold> {
    let node = network.node(id)?;
    let above = |place: usize| node.inputs.get(place).filter(|id| alone(**id)).and_then(|id| walk(network, *id, alone));
    match &node.op {
        // Integers that the checkpoint brings are not scaled any more.
        Op::Linear { weight, .. } if weight.format().is_some() => None,
        Op::Norm { .. } | Op::Linear { .. } => Some(Fold { nodes: vec![id], channels: Channels::Same }),
        Op::BiasAdd { weight } if weight.shape().len() == 1 => {
            let mut fold = above(0)?;
            fold.nodes.push(id);
            Some(fold)
        }
        Op::Cast { .. } | Op::Scale { .. } | Op::Activation { kind: ActivationKind::Relu } => above(0),
        // One of the factors takes it all.
        Op::Binary { kind: BinaryKind::Multiply } => above(1).or_else(|| above(0)),
        // What comes out are means of the values, head by head.
        Op::Attention(attention) => {
            let fold = above(2).filter(|fold| fold.channels == Channels::Same)?;
            let (heads, kv_heads, head_dim) = (attention.heads, attention.kv_heads, attention.head_dim);
            let channels =
                if heads == kv_heads { Channels::Same } else { Channels::Shared { heads, kv_heads, head_dim } };
            Some(Fold { channels, ..fold })
        }
        _ => None,
    }
}

/// Puts nodes in; those behind the same node follow each other.
fn insert(network: &mut Network, insertions: Vec<Insertion>) {
    let old = std::mem::take(&mut network.nodes);
    let mut places: Vec<NodeId> = Vec::with_capacity(old.len());
    // For a reader the node that it reads in place of what it did.
    let mut instead: HashMap<NodeId, NodeId> = HashMap::new();
    for (place, mut node) in old.into_iter().enumerate() {
        let id = NodeId(place);
        for (number, input) in node.inputs.iter_mut().enumerate() {
            *input = instead.get(&id).copied().filter(|_| number == 0).unwrap_or(places[input.0]);
        }
        let (path, ty) = (node.path.clone(), node.ty.clone());
        network.nodes.push(node);
        places.push(NodeId(network.nodes.len() - 1));
        for (number, insertion) in insertions.iter().filter(|insertion| insertion.after == id).enumerate() {
            let before = insertion.readers.first().and_then(|reader| instead.get(reader)).copied();
            let inputs = vec![before.unwrap_or(places[place])];
            let suffix = if number == 0 { String::new() } else { format!(".{}", number + 1) };
            let path = format!("{path}/{}{suffix}", insertion.op.name());
            network.nodes.push(Node { path, op: insertion.op.clone(), inputs, ty: ty.clone() });
            let new = NodeId(network.nodes.len() - 1);
            instead.extend(insertion.readers.iter().map(|reader| (*reader, new)));
        }
    }
    network.outputs.iter_mut().for_each(|(_, id)| *id = places[id.0]);
}

#[cfg(test)]
mod tests;
