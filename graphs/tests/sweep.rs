//! Samples swept through a network together, against the interpreter that runs each by itself.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use graphs::interpret::{Array, Caches, Interpreter, Seen, Values, sweep};
use graphs::{DType, Logits, Model, Weight};
use serde_json::json;
use std::collections::BTreeMap;

/// Values drawn by a weight's name.
struct Drawn;

impl Values for Drawn {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let mut state =
            weight.key().bytes().fold(7u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from((state >> 16) as u16) / 65536.0 - 0.4
        };
        Ok((0..weight.count()).map(|_| next()).collect())
    }
}

fn sample(ids: &[i32]) -> BTreeMap<String, Array> {
    let count = ids.len() as i32;
    BTreeMap::from([
        ("input_ids".to_owned(), Array::int([1, ids.len()], ids.to_vec())),
        ("position_ids".to_owned(), Array::int([1, ids.len()], (0..count).collect())),
        ("past_lengths".to_owned(), Array::int([1], vec![0])),
        ("sequence_lengths".to_owned(), Array::int([1], vec![count])),
    ])
}

#[test]
fn samples_together_give_what_each_gives_alone() {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    });
    let network = Model::from_config(&config).unwrap().networks(DType::Float32, Logits::All).unwrap().remove(0);
    let samples = [&[1, 2, 3][..], &[9], &[5, 4, 3, 2, 1, 60]].map(sample);
    let mut order = Vec::new();
    let mut see = |seen: Seen<'_>| {
        assert_eq!(seen.inputs.len(), seen.node.inputs.len());
        order.push((seen.position, seen.sample));
    };
    let found = sweep(&network, &Drawn, samples.to_vec(), &mut see).unwrap();
    let interpreter = Interpreter::new(network.clone(), &Drawn).unwrap();
    for (sample, found) in samples.iter().zip(&found) {
        let tokens = sample["input_ids"].len();
        let wanted = interpreter.run(sample, &mut Caches::new(&network, 1, tokens), None).unwrap();
        assert_eq!(&wanted, found);
    }
    let wanted: Vec<(usize, usize)> =
        (0..network.nodes.len()).flat_map(|position| (0..3).map(move |sample| (position, sample))).collect();
    assert_eq!(order, wanted);
    let missing = BTreeMap::from([("input_ids".to_owned(), Array::int([1, 1], vec![1]))]);
    assert!(sweep(&network, &Drawn, vec![missing], &mut |_| {}).is_err());
}
