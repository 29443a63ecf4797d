//! Wraps the weights of the layers that the recipe names; the network's shape is unchanged.
use super::{PassError, Passed, Plan};
use crate::calibration::Wanted;
use graphs::{Op, Weight};
use quant::Method;
use std::collections::HashMap;

pub(super) fn quantize(mut passed: Passed, _: &Plan<'_>) -> Result<Passed, PassError> {
    let network = &mut passed.network;
    let chosen: HashMap<&str, _> = passed
        .assignments
        .iter()
        .filter_map(|choice| Some((choice.path.as_str(), (choice.format?, choice.method))))
        .collect();
    for node in &mut network.nodes {
        let (Op::Linear { weight, .. }, Some(&(format, method))) = (&mut node.op, chosen.get(node.path.as_str()))
        else {
            continue;
        };
        // What the checkpoint holds quantized stays so.
        if weight.format().is_some() {
            continue;
        }
        let input = match method {
            Method::Mse => None,
            Method::Awq => passed.inputs.get(&node.path).cloned(),
            Method::Nearest | Method::Smooth { .. } | Method::Absmax { .. } => {
                *weight = weight.clone().packed(format);
                continue;
            }
        };
        let &[out, width] = &weight.shape()[..] else { continue };
        let name = format!("scales:{}/{}", network.name, node.path);
        let scales = Weight::tensor(name.clone(), &format.scale_shape(out, width));
        passed.wanted.push(Wanted::Scales { name, of: weight.clone(), format, input });
        *weight = Weight::Packed { format, scales: Some(Box::new(scales)), of: Box::new(weight.clone()) };
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
