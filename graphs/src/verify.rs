//! Rules that a network satisfies after every pass; the first bad node is named.
use crate::infer::infer;
use crate::{GraphError, Network, Op, Type};
use std::collections::HashSet;

/// Checks order, paths, types and outputs.
///
/// # Errors
/// The first node that breaks a rule, with its path.
pub fn verify(network: &Network) -> Result<(), GraphError> {
    let mut paths = HashSet::new();
    let mut slots = HashSet::new();
    for (position, node) in network.nodes.iter().enumerate() {
        let fail = |reason: String| GraphError::Node { path: node.path.clone(), op: node.op.name(), reason };
        if !paths.insert(&node.path) {
            return Err(fail("the path is used twice".into()));
        }
        if let Some(input) = node.inputs.iter().find(|input| input.0 >= position) {
            return Err(fail(format!("reads %{}, which does not come before it", input.0)));
        }
        let types: Vec<&Type> = node.inputs.iter().map(|input| &network.nodes[input.0].ty).collect();
        let ty = infer(&node.op, &types, Some(&node.ty), network.dtype).map_err(fail)?;
        if ty != node.ty {
            return Err(fail(format!("has type {}, its inputs give {ty}", node.ty)));
        }
        let rounded = |input: &&crate::NodeId| matches!(network.nodes[input.0].op, Op::QuantizeInput { .. });
        if let (Some(input), false) = (node.inputs.iter().find(rounded), matches!(node.op, Op::Linear { .. })) {
            return Err(fail(format!("reads `{}`, which is for linear layers only", network.nodes[input.0].path)));
        }
        if let Op::Attention(attention) = &node.op
            && let Some(slot) = attention.cache
            && !slots.insert(slot)
        {
            return Err(fail(format!("cache slot {slot} is used twice")));
        }
    }
    if network.outputs.is_empty() {
        return Err(GraphError::Network { name: network.name.clone(), reason: "has no output".into() });
    }
    let mut names = HashSet::new();
    for (name, id) in &network.outputs {
        if network.node(*id).is_none() || !names.insert(name) {
            let reason = format!("output `{name}` is given twice or names no node");
            return Err(GraphError::Network { name: network.name.clone(), reason });
        }
    }
    Ok(())
}
