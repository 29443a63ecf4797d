//! `verify`: whether an engine computes what the reference does.
use super::run::{executor, placement};
use crate::cli::{Target, VerifyArgs};
use crate::engine_dir::EngineDirectory;
use crate::failure::{Exit, Failure};
use crate::report::{Printer, table};
use crate::runtime::{Executor, Ranks, Reference};
use crate::verify::{self, Comparison, Feed};
use graphs::DType;
use serde_json::json;

pub fn run(args: &VerifyArgs, printer: &Printer) -> Result<(), Failure> {
    let directory = EngineDirectory::open(&args.directory)?;
    let mut engine = executor(&directory, Some(args.target), &args.ranks)?;
    // Ranks against ranks: each result is compared that the first one gives.
    let mut reference = executor(&directory, Some(Target::Reference), &args.ranks)?;
    let config = directory.config(directory.language())?;
    let plain = Reference::open(&directory)?;
    let usual = verify::bound(config.pretrained_config.dtype, plain.quantizes_inputs());
    // Without INT8 inputs the last bits of float32 decide nothing.
    let steady = config.pretrained_config.dtype == DType::Float32 && !plain.quantizes_inputs();
    let mut rounded: Option<Box<dyn Executor>> = match directory.manifest.tp {
        _ if steady => None,
        1 => Some(Box::new(plain.rounded())),
        _ => Some(Box::new(Ranks::reference(&directory, true, &placement(&args.ranks))?)),
    };
    let sizes = config.build_config;
    let features = config.pretrained_config.multimodal.map_or(0, |found| found.num_visual_features);
    let feed = Feed {
        seed: args.seed,
        batch: args.batch.unwrap_or(sizes.max_batch_size).min(sizes.max_batch_size),
        input_len: args.input_len.unwrap_or(features + 16).min(sizes.max_input_len),
        // The prompt gives the first token.
        steps: args.steps.min(sizes.max_output_len.saturating_sub(1)),
    };
    let found = verify::verify(engine.as_mut(), reference.as_mut(), rounded.as_deref_mut(), &config, feed)?;
    let limit = args.bound.unwrap_or(usual);
    let shown: Vec<_> = found.comparisons.iter().filter(|one| args.layers || !one.is_mark()).collect();
    if args.layers && shown.iter().all(|one| !one.is_mark()) {
        return Err(Failure::new(Exit::Refused, "no layer was marked when the directory was built")
            .hint(Some("build with --mark '**.mlp.down_proj' or other patterns".into())));
    }
    // A bound that was asked for is one for all. NaN is no number below a bound.
    let bound = |one: &Comparison| if args.bound.is_some() { limit } else { found.bound(&one.result, limit) };
    let passed = |one: &Comparison| one.relative_error <= bound(one);
    if printer.is_json() {
        let shown_with_bound = |one: &&Comparison| {
            let mut value = json!(one);
            value["bound"] = json!(bound(one));
            value
        };
        let (target, equal) = (args.target.name(), found.equal_choices);
        printer.json(&json!({
            "schema": 1, "target": target, "bound": limit, "comparisons": shown.iter().map(shown_with_bound).collect::<Vec<_>>(), "choices": found.choices,
            "equal_choices": equal, "passed": shown.iter().all(|one| passed(one)),
        }));
    } else {
        let row = |one: &&Comparison| {
            let verdict = if passed(one) { "ok" } else { "TOO LARGE" };
            let numbers = [one.relative_error, one.worst_call, one.rounding_error, bound(one)];
            let mut row = vec![one.stage.to_owned(), one.result.clone()];
            row.extend(numbers.map(|number| format!("{number:.2e}")));
            row.push(verdict.to_owned());
            row
        };
        printer.data(&table(
            &["stage", "result", "relative error", "of the worst call", "of rounding alone", "bound", ""],
            &shown.iter().map(row).collect::<Vec<_>>(),
        ));
        printer.data(&format!(
            "{} of {} greedy choices equal ({} requests, {} prompt tokens, {} steps)",
            found.equal_choices, found.choices, feed.batch, feed.input_len, feed.steps
        ));
    }
    let worst = shown.iter().find(|one| !passed(one));
    match worst {
        Some(one) => Err(Failure::new(
            Exit::Gate,
            format!(
                "{} `{}`: relative error {:.2e}, bound {:.2e}",
                one.stage,
                one.result,
                one.relative_error,
                bound(one)
            ),
        )
        .told()),
        None => Ok(()),
    }
}
