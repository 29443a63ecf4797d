//! Attention over an INT8 cache: by its definition once more, whatever the calls are; as text, and where it does not belong.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{Attention, DType, Logits, Network, Op, parse, verify};
use std::collections::BTreeMap;

/// 4 heads of 6 on 2, rotary positions.
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 6;
const TEXT: &str = "network toy float32\n\
    %0 q = input() : float32[batch,tokens,24]\n%1 k = input() : float32[batch,tokens,12]\n\
    %2 v = input() : float32[batch,tokens,12]\n%3 positions = input() : int32[batch,tokens]\n\
    %4 past = input() : int32[batch]\n%5 sequence = input() : int32[batch]\n\
    %6 mixed = attention(%0, %1, %2, %3, %4, %5) {\"heads\":4,\"kv_heads\":2,\"head_dim\":6,\"scale\":0.5,\"mask\":\"causal\",\
    \"rope\":{\"theta\":100.0,\"max_positions\":64},\"cache\":0,\"int8_cache\":true} : float32[batch,tokens,24]\noutput mixed = %6\n";

fn network() -> Network {
    let network = parse(TEXT).unwrap();
    verify(&network).unwrap();
    assert_eq!(graphs::print(&network), TEXT);
    network
}

fn draw(count: usize, mut state: u32) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 32768.0 - 1.0
    };
    (0..count).map(|_| next() * 3.0).collect()
}

/// Queries, keys and values of one request's tokens in calls of so many.
fn in_calls(qkv: &[Vec<f32>; 3], calls: &[usize]) -> Vec<f32> {
    let network = network();
    let mut caches = Caches::new(&network, 1, calls.iter().sum());
    let interpreter = Interpreter::new(network, &Drawn).unwrap();
    let (mut past, mut result) = (0, Vec::new());
    for &tokens in calls {
        let part = |x: &[f32], width: usize| {
            Array::float([1, tokens, width], x[past * width..(past + tokens) * width].to_vec())
        };
        let inputs = BTreeMap::from([
            ("q", part(&qkv[0], HEADS * DIM)),
            ("k", part(&qkv[1], KV_HEADS * DIM)),
            ("v", part(&qkv[2], KV_HEADS * DIM)),
            ("positions", Array::int([1, tokens], (past..past + tokens).map(|place| place as i32).collect())),
            ("past", Array::int([1], vec![past as i32])),
            ("sequence", Array::int([1], vec![(past + tokens) as i32])),
        ]);
        result.extend_from_slice(interpreter.run(&inputs, &mut caches, None).unwrap()["mixed"].floats().unwrap());
        past += tokens;
    }
    result
}

fn turned(x: &[f32], place: usize) -> Vec<f64> {
    let angle = |i: usize| place as f64 * 100f64.powf(-(i as f64) / (DIM / 2) as f64);
    let at = |d: usize| f64::from(x[d]);
    let half = DIM / 2;
    let low = (0..half).map(|i| at(i) * angle(i).cos() - at(i + half) * angle(i).sin());
    let high = (0..half).map(|i| at(i + half) * angle(i).cos() + at(i) * angle(i).sin());
    low.chain(high).collect()
}

/// To the nearest of 255 steps of the largest magnitude / 127.
fn kept(row: &[f64]) -> Vec<f64> {
    let step = row.iter().fold(0f64, |most, x| most.max(x.abs())) / 127.0;
    let nearest = |x: &f64| {
        let away = |steps: &i32| (x - f64::from(*steps) * step).abs();
        (-127..=127).min_by(|a, b| away(a).total_cmp(&away(b))).unwrap()
    };
    row.iter().map(|x| f64::from(nearest(x)) * step).collect()
}

/// Each query by itself, in float64.
fn by_definition(qkv: &[Vec<f32>; 3], tokens: usize) -> Vec<f64> {
    let row = |x: &[f32], token: usize, head: usize, heads: usize| {
        x[(token * heads + head) * DIM..(token * heads + head + 1) * DIM].to_vec()
    };
    let mut result = Vec::new();
    for token in 0..tokens {
        for head in 0..HEADS {
            let q = turned(&row(&qkv[0], token, head, HEADS), token);
            let of = |x: &[f32], key: usize| row(x, key, head / (HEADS / KV_HEADS), KV_HEADS);
            let weights: Vec<f64> = (0..=token)
                .map(|key| {
                    let k = kept(&turned(&of(&qkv[1], key), key));
                    (std::iter::zip(&q, &k).map(|(a, b)| a * b).sum::<f64>() * 0.5).exp()
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            let values: Vec<Vec<f64>> = (0..=token)
                .map(|key| kept(&of(&qkv[2], key).iter().map(|&x| f64::from(x)).collect::<Vec<_>>()))
                .collect();
            result.extend((0..DIM).map(|d| {
                std::iter::zip(&weights, &values).map(|(weight, value)| weight * value[d]).sum::<f64>() / sum
            }));
        }
    }
    result
}

#[test]
fn attention_is_what_its_definition_says_however_it_is_called() {
    const TOKENS: usize = 9;
    let qkv = [(HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)].map(|(heads, seed)| draw(TOKENS * heads * DIM, seed));
    let wanted: Vec<f32> = by_definition(&qkv, TOKENS).iter().map(|&x| x as f32).collect();
    let at_once = in_calls(&qkv, &[TOKENS]);
    assert!(worst(&at_once, &wanted) < 1e-4, "{}", worst(&at_once, &wanted));
    // New rows are read back from the cache too, so that a prompt in pieces is the prompt.
    for calls in [&[5, 1, 1, 1, 1][..], &[1; TOKENS], &[2, 7]] {
        assert!(worst(&in_calls(&qkv, calls), &at_once) < 1e-5, "{calls:?}");
    }
    // It does something: a cache of numbers gives other results.
    let plain = parse(&TEXT.replace(",\"int8_cache\":true", "")).unwrap();
    assert_ne!(plain, network());
    assert_eq!(plain.caches()[0].row_elements(), 6);
    let cache = network().caches()[0];
    assert_eq!(
        (cache.row_elements(), cache.dtype(DType::Float16), cache.token_bytes(DType::Float16)),
        (12, DType::Int8, 48)
    );
}

#[test]
fn it_belongs_to_a_cache() {
    let text = TEXT.replace("\"cache\":0,", "").replace("(%0, %1, %2, %3, %4, %5)", "(%0, %1, %2, %3)");
    let error = verify(&parse(&text).unwrap()).unwrap_err().to_string();
    assert!(error.contains("`mixed`") && error.contains("keys and values that are not kept"), "{error}");
}

/// A network whose caches are INT8.
fn int8(mut network: Network) -> Network {
    for node in &mut network.nodes {
        if let Op::Attention(attention @ Attention { cache: Some(_), .. }) = &mut node.op {
            attention.int8_cache = true;
        }
    }
    verify(&network).unwrap();
    network
}

#[test]
fn one_layer_as_text() {
    let networks = open("llava-hf", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("llama_attention_int8", lines(&int8(networks[1].clone()), ".layers.0.self_attn"));
    let networks = open("blip2-t5", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    // Keys and values of the encoder's output stay as they are.
    insta::assert_snapshot!("t5_attention_int8", lines(&int8(networks[3].clone()), ".decoder.block.1.layer.0"));
}

/// The golden's greedy ids and logits do not move far.
#[test]
fn a_model_says_nearly_the_same() {
    let fixture = open("llava-hf", &[]);
    let language = fixture.networks(Logits::All).remove(1);
    let image = fixture.model.facts().pictures.unwrap().token_id.unwrap();
    let (ids, _) = spliced(&fixture, image);
    let facts = fixture.model.facts();
    let table = Array::float([facts.pictures.unwrap().features, facts.hidden], fixture.golden("projector_out"));
    let interpreter = fixture.interpreters_of(vec![int8(language)]).remove(0);
    let logits = continue_prompt(&interpreter, &ids, &table, &fixture.golden_ints("generated"));
    let wanted = fixture.golden("logits");
    let size = wanted.iter().map(|x| x * x).sum::<f32>().sqrt();
    let error = std::iter::zip(&logits, &wanted).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt() / size;
    assert!(error > 1e-6 && error < 1e-2, "{error}");
}
