//! Deviations against sums written out, and choices under a budget against all there are.
#![allow(clippy::unwrap_used, reason = "tests")]
mod common;
use common::noise;
use proptest::prelude::*;
use quant::{Deviation, Price, allot};

#[test]
fn deviations_are_those_of_the_definition() {
    let (rows, width, out) = (5, 7, 4);
    let (x, w) = (noise(rows * width, 1), noise(out * width, 2));
    let (rounded_x, rounded_w) = (noise(rows * width, 3), noise(out * width, 4));
    let product = |x: &[f32], w: &[f32], row: usize, output: usize| -> f64 {
        (0..width).map(|at| f64::from(x[row * width + at]) * f64::from(w[output * width + at])).sum()
    };
    let (mut off, mut whole) = (0.0, 0.0);
    for row in 0..rows {
        for output in 0..out {
            let wanted = product(&x, &w, row, output);
            off += (wanted - product(&rounded_x, &rounded_w, row, output)).powi(2);
            whole += wanted.powi(2);
        }
    }
    let found = Deviation::of_products((&x, &w), (&rounded_x, &rounded_w), width);
    assert!((found.off / off - 1.0).abs() < 1e-5 && (found.whole / whole - 1.0).abs() < 1e-5, "{found:?}");
    assert!((found.relative() - (off / whole).sqrt()).abs() < 1e-5);
    // Of weights, and of blocks summed.
    let parts: Deviation =
        std::iter::zip(w.chunks(9), rounded_w.chunks(9)).map(|(a, b)| Deviation::of_weights(a, b)).sum();
    let all = Deviation::of_weights(&w, &rounded_w);
    assert!((parts.off - all.off).abs() < 1e-9 && (parts.whole - all.whole).abs() < 1e-9);
    assert_eq!(Deviation::of_weights(&w, &w).relative(), 0.0);
    assert_eq!(Deviation::of_weights(&[0.0], &[0.0]).relative(), 0.0);
    assert!(Deviation::of_weights(&[0.0], &[1.0]).relative().is_infinite());
}

/// Every combination, one after the other: the least loss within the budget.
fn exhaustive(units: &[Vec<Price>], budget: u64) -> Option<f64> {
    let Some((first, rest)) = units.split_first() else { return Some(0.0) };
    let losses =
        first.iter().filter_map(|option| Some(option.loss + exhaustive(rest, budget.checked_sub(option.cost)?)?));
    losses.min_by(f64::total_cmp)
}

fn total(units: &[Vec<Price>], chosen: &[usize]) -> (u64, f64) {
    let prices = std::iter::zip(units, chosen).map(|(options, option)| options[*option]);
    prices.fold((0, 0.0), |(cost, loss), price| (cost + price.cost, loss + price.loss))
}

fn units() -> impl Strategy<Value = Vec<Vec<Price>>> {
    let price = (1u64..40, 0u32..100).prop_map(|(cost, loss)| Price { cost, loss: f64::from(loss) / 8.0 });
    prop::collection::vec(prop::collection::vec(price, 1..5), 1..6)
}

proptest! {
    #[test]
    fn choices_keep_the_budget_and_lose_at_most_a_step_more_than_the_best(units in units(), budget in 1u64..160) {
        let best = exhaustive(&units, budget);
        let found = allot(&units, budget);
        prop_assert_eq!(found.is_some(), best.is_some());
        if let (Some(found), Some(best)) = (found, best) {
            let (cost, loss) = total(&units, &found);
            prop_assert!(cost <= budget);
            let span = |options: &Vec<Price>| {
                let losses = || options.iter().map(|option| option.loss);
                losses().fold(0.0, f64::max) - losses().fold(f64::INFINITY, f64::min)
            };
            let step = units.iter().map(span).fold(0.0, f64::max);
            prop_assert!(loss >= best - 1e-9 && loss <= best + step + 1e-9, "{loss} {best} {step}");
        }
    }

    #[test]
    fn more_bits_never_lose_more(units in units(), budget in 1u64..160) {
        let losses: Vec<f64> = (budget..budget + 30)
            .filter_map(|budget| Some(total(&units, &allot(&units, budget)?).1))
            .collect();
        prop_assert!(losses.windows(2).all(|pair| pair[1] <= pair[0] + 1e-9), "{losses:?}");
    }
}

#[test]
fn with_room_for_all_nothing_is_lost() {
    let price = |cost, loss| Price { cost, loss };
    let units = vec![vec![price(4, 1.0), price(16, 0.0)], vec![price(16, 0.0), price(4, 3.0), price(8, 2.9)]];
    assert_eq!(allot(&units, 32), Some(vec![1, 0]));
    assert_eq!(allot(&units, 20), Some(vec![0, 0]), "the one that wins more for its bits");
    assert_eq!(allot(&units, 8), Some(vec![0, 1]));
    assert_eq!(allot(&units, 7), None);
    assert_eq!(allot(&[vec![]], 7), None, "a unit without options");
    assert_eq!(allot(&[vec![price(1, f64::NAN)]], 7), None);
}
