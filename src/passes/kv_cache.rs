//! Lets every cache hold INT8 rows. Keys and values that a decoder reads of its encoder are no cache: they stay as they are.
use super::{PassError, Passed, Plan};
use graphs::Op;

pub(super) fn kv_cache(mut passed: Passed, plan: &Plan<'_>) -> Result<Passed, PassError> {
    if plan.int8_kv_cache {
        for node in &mut passed.network.nodes {
            if let Op::Attention(attention) = &mut node.op {
                attention.int8_cache = attention.cache.is_some();
            }
        }
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::super::{Plan, run};
    use graphs::{DType, Logits, Model, Op};
    use quant::Recipe;
    use serde_json::json;

    #[test]
    fn only_caches_become_int8() {
        let config = json!({
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8,
            "num_heads": 4, "num_layers": 2, "vocab_size": 100, "decoder_start_token_id": 0,
        });
        let recipe = Recipe::load("none").unwrap();
        let networks = Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap();
        for network in networks {
            let before = network.caches().len();
            let plain = run(network.clone(), &Plan::new(&recipe)).unwrap().network;
            assert_eq!(plain, network);
            let plan = Plan { int8_kv_cache: true, ..Plan::new(&recipe) };
            let passed = run(network, &plan).unwrap().network;
            assert_eq!(passed.caches().len(), before, "{}", passed.name);
            assert!(passed.caches().iter().all(|cache| cache.int8 && cache.row_elements() == 12));
            let attentions = passed.nodes.iter().filter(|node| matches!(node.op, Op::Attention(_))).count();
            assert_eq!((attentions, before), if passed.name == "decoder" { (4, 2) } else { (attentions, 0) });
        }
    }
}
