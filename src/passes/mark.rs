//! Marks: results inside a network that become outputs of their own, for comparing targets layer by layer (`verify`).
use super::{PassError, Passed, Plan};
use graphs::{NodeId, Op};

/// What the name of such an output starts with; the node's path follows.
pub const MARK: &str = "mark/";

pub(super) fn mark(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let network = &mut passed.network;
    for pattern in plan.marks {
        let matches =
            quant::path_glob(pattern).map_err(|reason| PassError::Mark { pattern: pattern.clone(), reason })?;
        for (place, node) in network.nodes.iter().enumerate() {
            let name = format!("{MARK}{}", node.path);
            let known = network.outputs.iter().any(|(other, id)| *other == name || id.0 == place);
            if node.op != Op::Input && matches(&node.path) && !known {
                network.outputs.push((name, NodeId(place)));
                passed.marked.push(pattern.clone());
            }
        }
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::super::{Plan, run};
    use graphs::{DType, Logits, Model, Network};
    use proptest::prelude::*;
    use quant::Recipe;
    use serde_json::json;

    fn network() -> Network {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 128,
        });
        Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap().remove(0)
    }

    fn outputs(network: &Network) -> String {
        let line = |(name, id): &(String, graphs::NodeId)| format!("{name} = {}", network.nodes[id.0].path);
        network.outputs.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn before_and_after() {
        let recipe = Recipe::preset("none").unwrap();
        let marks = ["**.mlp.down_proj".to_owned(), "**.down_proj".to_owned(), "model.norm".to_owned()];
        let passed =
            run(network(), &Plan { recipe: &recipe, dump: None, marks: &marks, quantized: &|_| None }).unwrap();
        insta::assert_snapshot!("before", outputs(&network()));
        insta::assert_snapshot!("after", outputs(&passed.network));
    }

    proptest! {
        /// Whatever is marked, nothing changes but the list of outputs, which grows by the nodes that match.
        #[test]
        fn only_adds_outputs(part in "(q|k|v|o|gate|up|down)_proj") {
            let recipe = Recipe::preset("none").unwrap();
            let marks = [format!("**.{part}")];
            let mut passed = run(network(), &Plan { recipe: &recipe, dump: None, marks: &marks, quantized: &|_| None }).unwrap();
            let added = passed.network.outputs.split_off(network().outputs.len());
            prop_assert_eq!(added.len(), 2);
            for (name, id) in added {
                let path = &passed.network.nodes[id.0].path;
                prop_assert!(path.ends_with(&part), "{}", path);
                prop_assert_eq!(name, format!("mark/{path}"));
            }
            prop_assert_eq!(passed.network, network());
        }
    }
}
