//! Weight-only quantization: wraps the weights of the layers that the recipe names; the network's shape is unchanged.
use super::{PassError, Passed, Plan};
use graphs::Op;
use std::collections::HashMap;

pub(super) fn quantize(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let network = &mut passed.network;
    // Parts of layers that the checkpoint holds quantized have paths below theirs, and are never quantized.
    let linears = network.nodes.iter().filter_map(|node| match &node.op {
        Op::Linear { weight, .. } if !node.path.contains('/') => match weight.shape()[..] {
            [out, width] => Some((node.path.as_str(), out, width)),
            _ => None,
        },
        _ => None,
    });
    passed.assignments = quant::assign(plan.recipe, linears)
        .map_err(|source| PassError::Quantize { network: network.name.clone(), source })?;
    let held: HashMap<&str, _> = network
        .nodes
        .iter()
        .filter(|node| matches!(node.op, Op::Linear { .. }))
        .filter_map(|node| Some((node.path.as_str(), node.op.weights().first()?.format()?)))
        .collect();
    for choice in &mut passed.assignments {
        let Some(&found) = held.get(choice.path.as_str()) else { continue };
        if let Some(wanted) = choice.format.filter(|wanted| *wanted != found) {
            let (recipe, path) = (plan.recipe.name.clone(), choice.path.clone());
            return Err(PassError::Contradiction { recipe, path, wanted, found });
        }
        choice.format = Some(found);
    }
    let formats: HashMap<&str, _> =
        passed.assignments.iter().filter_map(|choice| Some((choice.path.as_str(), choice.format?))).collect();
    for node in &mut network.nodes {
        if let (Op::Linear { weight, .. }, Some(&format)) = (&mut node.op, formats.get(node.path.as_str()))
            && weight.format().is_none()
        {
            *weight = weight.clone().packed(format);
        }
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::super::{Plan, run};
    use graphs::{DType, Logits, Model, Network, Op, Weight};
    use proptest::prelude::*;
    use quant::Recipe;
    use serde_json::json;

    fn network() -> Network {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 448, "max_position_embeddings": 128,
        });
        Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap().remove(0)
    }

    /// The network with every quantized weight replaced by what it was made of.
    fn unwrapped(mut network: Network) -> Network {
        for node in &mut network.nodes {
            if let Op::Linear { weight, .. } = &mut node.op
                && let Weight::Packed { of, .. } = weight
            {
                *weight = (**of).clone();
            }
        }
        network
    }

    #[test]
    fn before_and_after() {
        let recipe = Recipe::preset("int4").unwrap();
        let passed = run(network(), &Plan::new(&recipe)).unwrap();
        let mlp = |network: &Network| {
            let text = graphs::print(network);
            let lines = text.lines().filter(|line| line.contains(" model.layers.1.mlp.") || line.contains("lm_head ="));
            lines.map(str::to_owned).collect::<Vec<_>>().join("\n")
        };
        insta::assert_snapshot!("before", mlp(&network()));
        insta::assert_snapshot!("after", mlp(&passed.network));
    }

    proptest! {
        /// Whatever is chosen, only weights of the layers chosen change, and only by being wrapped.
        #[test]
        fn only_wraps_what_the_recipe_names(part in "(q|k|v|o|gate|up|down)_proj", int8 in any::<bool>()) {
            let format = if int8 { "format = 'int8'" } else { "format = 'int4'\ngroup = 32" };
            let text = format!("name = 'r'\n[[rule]]\nmatch = '**.{part}'\n{format}");
            let recipe = Recipe::parse(&text, "r.toml").unwrap();
            let passed = run(network(), &Plan::new(&recipe)).unwrap();
            let changed = passed.network.nodes.iter().filter(|node| node.op.weights().iter().any(|w| w.format().is_some()));
            let changed: Vec<&str> = changed.map(|node| node.path.as_str()).collect();
            prop_assert_eq!(changed.len(), 2);
            prop_assert!(changed.iter().all(|path| path.ends_with(&part)), "{:?}", changed);
            prop_assert_eq!(unwrapped(passed.network), network());
        }
    }
}
