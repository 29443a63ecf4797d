//! Weight-only quantization: wraps the weights of the layers that the recipe names; the network's shape is unchanged.
use super::{PassError, Passed, Plan};
use graphs::{Op, Weight};
use std::collections::HashMap;

pub(super) fn quantize(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let network = &mut passed.network;
    let linears = network.nodes.iter().filter_map(|node| match &node.op {
        Op::Linear { weight, .. } => match weight.shape()[..] {
            [out, width] => Some((node.path.as_str(), out, width)),
            _ => None,
        },
        _ => None,
    });
    passed.assignments = quant::assign(plan.recipe, linears)
        .map_err(|source| PassError::Quantize { network: network.name.clone(), source })?;
    let formats: HashMap<&str, _> =
        passed.assignments.iter().filter_map(|choice| Some((choice.path.as_str(), choice.format?))).collect();
    for node in &mut network.nodes {
        if let (Op::Linear { weight, .. }, Some(&format)) = (&mut node.op, formats.get(node.path.as_str())) {
            *weight = Weight::Packed { format, of: Box::new(weight.clone()) };
        }
    }
    Ok(passed)
}
