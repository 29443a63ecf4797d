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
        let lines = text.lines().filter(|line| {
            line.contains(" model.layers.1.") || line.contains("lm_head") || line.contains("embed_tokens")
        });
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
        (
            json!({}),
            "int4-g32",
            2,
            "48 of 2 ranks is no multiple of 32, the group of its INT4 weights; groups of 16 are",
            "1",
        ),
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

/// The row of the whole table that a network gives for a word, if it has it.
fn row(network: &Network, word: usize) -> Option<usize> {
    network.nodes.iter().find_map(|node| match &node.op {
        Op::Embed { weight: Weight::Slice { start, end, .. }, own: Some(own), .. } => {
            own.row_of(word).map(|row| row + start).filter(|row| row < end)
        }
        Op::Embed { own: None, .. } => Some(word),
        _ => None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each weight is on one rank; those of shared key/value heads on as many as share them; words of the head at the
    /// seam of the last two ranks on both.
    #[test]
    fn every_weight_is_somewhere(ranks in prop::sample::select(vec![1usize, 2, 4, 8]), kv in prop::sample::select(vec![1usize, 2, 4, 8]), vocab in 64usize..500) {
        let whole = network(json!({ "num_key_value_heads": kv, "vocab_size": vocab }));
        let parts: Vec<Network> = (0..ranks).map(|rank| divided(whole.clone(), "none", rank, ranks).unwrap()).collect();
        for word in 0..vocab {
            let rows = parts.iter().filter_map(|part| row(part, word)).collect::<Vec<_>>();
            prop_assert_eq!(rows, [word]);
        }
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
