//! `verify`: whether an engine computes what the reference does.
use super::run::executor;
use crate::cli::{Target, VerifyArgs};
use crate::engine_dir::EngineDirectory;
use crate::failure::{Exit, Failure};
use crate::report::{Printer, table};
use crate::verify::{Feed, bound, verify};
use serde_json::json;

pub fn run(args: &VerifyArgs, printer: &Printer) -> Result<(), Failure> {
    let directory = EngineDirectory::open(&args.directory)?;
    let mut engine = executor(&directory, Some(args.target))?;
    let mut reference = executor(&directory, Some(Target::Reference))?;
    let config = directory.config(directory.language())?;
    let sizes = config.build_config;
    let features = config.pretrained_config.multimodal.map_or(0, |found| found.num_visual_features);
    let feed = Feed {
        seed: args.seed,
        batch: args.batch.unwrap_or(sizes.max_batch_size).min(sizes.max_batch_size),
        input_len: args.input_len.unwrap_or(features + 16).min(sizes.max_input_len),
        steps: args.steps.min(sizes.max_output_len),
    };
    let found = verify(engine.as_mut(), reference.as_mut(), &config, feed)?;
    let limit = args.bound.unwrap_or_else(|| bound(config.pretrained_config.dtype));
    let shown: Vec<_> = found.comparisons.iter().filter(|one| args.layers || !one.is_mark()).collect();
    if args.layers && shown.iter().all(|one| !one.is_mark()) {
        return Err(Failure::new(Exit::Refused, "no layer was marked when the directory was built")
            .hint(Some("build with --mark '**.mlp.down_proj' or other patterns".into())));
    }
    // NaN is no number below the limit.
    let passed = |error: f64| error <= limit;
    if printer.is_json() {
        let (target, equal) = (args.target.name(), found.equal_choices);
        printer.json(&json!({
            "schema": 1, "target": target, "bound": limit, "comparisons": shown, "choices": found.choices,
            "equal_choices": equal, "passed": shown.iter().all(|one| passed(one.relative_error)),
        }));
    } else {
        let row = |one: &&crate::verify::Comparison| {
            let verdict = if passed(one.relative_error) { "ok" } else { "TOO LARGE" };
            let error = format!("{:.2e}", one.relative_error);
            vec![one.stage.to_owned(), one.result.clone(), error, format!("{:.2e}", one.worst_call), verdict.to_owned()]
        };
        printer.data(&table(
            &["stage", "result", "relative error", "of the worst call", ""],
            &shown.iter().map(row).collect::<Vec<_>>(),
        ));
        printer.data(&format!(
            "bound {limit:.0e}; {} of {} greedy choices equal ({} requests, {} prompt tokens, {} steps)",
            found.equal_choices, found.choices, feed.batch, feed.input_len, feed.steps
        ));
    }
    let worst = shown.iter().find(|one| !passed(one.relative_error));
    match worst {
        Some(one) => Err(Failure::new(
            Exit::Gate,
            format!("{} `{}`: relative error {:.2e}, bound {limit:.0e}", one.stage, one.result, one.relative_error),
        )
        .told()),
        None => Ok(()),
    }
}
