//! `run`: prompts and pictures in, answers out.
use crate::cli::{RankArgs, RunArgs, Target};
use crate::engine_dir::EngineDirectory;
use crate::failure::{Exit, Failure};
use crate::launch::World;
use crate::processor::{Picture, Processor};
use crate::report::{Color, Printer, ProgressMode};
use crate::runtime::{AnswerOptions, Ask, Executor, Placement, Process, Ranks, Reference, Session, Tensorrt};
use serde_json::json;
use std::time::{Duration, Instant};

pub fn run(args: &RunArgs, printer: &Printer) -> Result<(), Failure> {
    let world = World::from_environment(args.processes.rendezvous.as_deref())?;
    let Some(world) = world else { return answer(args, printer, None) };
    // Only the first of several processes speaks; the others fail aloud.
    let first = world.rank == 0;
    let silent = Printer::new(1, 0, false, Color::Auto, ProgressMode::None);
    answer(args, if first { printer } else { &silent }, Some(&world))
        .map_err(|failure| if first { failure } else { failure.told() })
}

fn answer(args: &RunArgs, printer: &Printer, world: Option<&World>) -> Result<(), Failure> {
    let start = Instant::now();
    let directory = EngineDirectory::open(&args.directory)?;
    let process = world.map(|world| join(&directory, args, world)).transpose()?;
    let speaks = world.is_none_or(|world| world.rank == 0);
    let pictures: Vec<Picture> = args.image.iter().map(|path| Picture::open(path)).collect::<Result<_, _>>()?;
    let mut session = match &process {
        None => open(&directory, args.target, &args.ranks)?,
        Some(process) => {
            let target = chosen(&directory, args.target)?;
            session(&directory, process.executor(&directory, target == Target::Tensorrt, &args.ranks.devices)?)?
        }
    };
    let prompts = prompts(args, &session)?;
    let shares = share(&prompts, &session, pictures.len())?;
    let asks: Vec<Ask> = std::iter::zip(&prompts, shares)
        .map(|(prompt, range)| Ask { prompt, pictures: pictures.get(range).unwrap_or_default() })
        .collect();
    let load_seconds = start.elapsed().as_secs_f64();
    let options = AnswerOptions { max_new_tokens: args.max_new_tokens, chat: args.chat };
    // One answer is shown as it is made; several would run into each other.
    let stream = speaks && !printer.is_json() && asks.len() == 1;
    let mut leading = true;
    let mut on_text = |_: usize, piece: &str| {
        let piece = if leading { piece.trim_start() } else { piece };
        if stream && !piece.is_empty() {
            leading = false;
            printer.raw(piece);
        }
    };
    let answered = session.answer(&asks, options, &mut on_text);
    let (answers, timings) = answered.map_err(|error| blamed(error.into(), process.as_ref()))?;
    if let Some(process) = process {
        process.finish();
    }
    if !speaks {
        return Ok(());
    }
    if printer.is_json() {
        let outputs: Vec<_> = answers
            .iter()
            .map(|answer| {
                let reason = answer.finish_reason.name();
                json!({ "token_ids": answer.token_ids, "text": answer.text, "finish_reason": reason })
            })
            .collect();
        let mut timings = serde_json::to_value(timings).unwrap_or_default();
        timings["load_seconds"] = json!(load_seconds);
        printer.json(&json!({ "outputs": outputs, "timings": timings }));
    } else if stream {
        printer.raw("\n");
    } else {
        answers.iter().for_each(|answer| printer.data(&answer.text));
    }
    printer.note(&format!(
        "{} new tokens, {:.1} a second in decode, first after {:.2} s",
        timings.new_tokens,
        timings.new_tokens.saturating_sub(answers.len()) as f64 / timings.decode_seconds.max(1e-9),
        timings.preprocess_seconds + timings.vision_seconds + timings.prefill_seconds
    ));
    Ok(())
}

/// With the other rank as a cause, if it is that one's fault: the GPU's own errors name nobody.
fn blamed(mut failure: Failure, process: Option<&Process>) -> Failure {
    if let Some(fault) = process.and_then(Process::fault) {
        let said = failure.message.contains(&fault) || failure.causes.iter().any(|cause| cause.contains(&fault));
        failure.causes.extend((!said).then_some(fault));
    }
    failure
}

/// Joins the processes of the other ranks.
fn join(directory: &EngineDirectory, args: &RunArgs, world: &World) -> Result<Process, Failure> {
    world.check(directory.manifest.tp)?;
    Ok(Process::join(world, directory, args.ranks.rank_timeout.map(Duration::from_secs))?)
}

/// Loads a directory for one of its targets.
pub(super) fn open(directory: &EngineDirectory, target: Option<Target>, ranks: &RankArgs) -> Result<Session, Failure> {
    session(directory, executor(directory, target, ranks)?)
}

fn session(directory: &EngineDirectory, executor: Box<dyn Executor>) -> Result<Session, Failure> {
    for name in directory.manifest.files.keys().filter(|name| name.starts_with(crate::engine_dir::PROCESSOR)) {
        directory.file(name)?;
    }
    let processor = Processor::open(&directory.processor())?;
    Ok(Session::new(executor, processor, directory.config(directory.language())?))
}

/// The networks of a directory, ready to run: those asked for, or the fastest that it has.
pub(super) fn executor(
    directory: &EngineDirectory,
    target: Option<Target>,
    ranks: &RankArgs,
) -> Result<Box<dyn Executor>, Failure> {
    let target = chosen(directory, target)?;
    Ok(match (target, directory.manifest.tp) {
        (Target::Tensorrt, 1) if ranks.devices.is_empty() => Box::new(Tensorrt::open(directory)?),
        (Target::Tensorrt, _) => Box::new(Ranks::tensorrt(directory, &placement(ranks))?),
        (_, 1) => Box::new(Reference::open(directory)?),
        _ => Box::new(Ranks::reference(directory, false, &placement(ranks))?),
    })
}

/// The target that was asked for, or the fastest that a directory has.
fn chosen(directory: &EngineDirectory, target: Option<Target>) -> Result<Target, Failure> {
    let targets = &directory.manifest.targets;
    let has = |target: Target| targets.contains_key(target.name());
    let default = if has(Target::Tensorrt) { Target::Tensorrt } else { Target::Reference };
    let target = target.unwrap_or(default);
    if target == Target::Rtx {
        let message = "engines of TensorRT-RTX cannot be run yet";
        return Err(Failure::new(Exit::Refused, message).hint(Some("use --target reference".into())));
    }
    check_target(directory, target)?;
    Ok(target)
}

pub(super) fn placement(args: &RankArgs) -> Placement {
    Placement { devices: args.devices.clone(), way: args.join, patience: args.rank_timeout.map(Duration::from_secs) }
}

/// Refuses a directory that was not built for a target.
pub(super) fn check_target(directory: &EngineDirectory, target: Target) -> Result<(), Failure> {
    let (targets, wanted) = (&directory.manifest.targets, target.name());
    if targets.contains_key(wanted) {
        return Ok(());
    }
    let found: Vec<&str> = targets.keys().map(String::as_str).collect();
    let path = directory.path.display();
    let message = format!("`{path}` was not built for target `{wanted}`, only for {}", found.join(", "));
    Err(Failure::new(Exit::Refused, message).hint(Some(format!("build with --target {wanted}"))))
}

/// The prompts as given; a model that reads pages takes an empty one for each.
fn prompts(args: &RunArgs, session: &Session) -> Result<Vec<String>, Failure> {
    let blank = args.prompt.len() < 2 && args.prompt.iter().all(|prompt| prompt.trim().is_empty());
    if session.config().reads_pages() && blank && !args.image.is_empty() {
        return Ok(vec![String::new(); args.image.len()]);
    }
    if args.prompt.is_empty() {
        let hint = "write it behind --prompt";
        return Err(Failure::new(Exit::Refused, "no prompt is given").hint(Some(hint.into())));
    }
    Ok(args.prompt.clone())
}

/// Which pictures belong to which prompt: by the placeholders that the prompts hold, else all to a single prompt, one to
/// each, or the same one to all.
fn share(asked: &[String], session: &Session, pictures: usize) -> Result<Vec<std::ops::Range<usize>>, Failure> {
    let prompts = asked.len();
    let placeholder = session.placeholder();
    let held: Vec<usize> = asked
        .iter()
        .map(|prompt| placeholder.as_deref().map_or(0, |placeholder| prompt.matches(placeholder).count()))
        .collect();
    if held.iter().sum::<usize>() == pictures {
        let starts = held.iter().scan(0, |next, count| Some(std::mem::replace(next, *next + count)));
        return Ok(std::iter::zip(starts, &held).map(|(start, count)| start..start + count).collect());
    }
    match (prompts, pictures) {
        (1, _) => Ok(std::iter::once(0..pictures).collect()),
        (_, 1) => Ok(vec![0..1; prompts]),
        _ if pictures == prompts => Ok((0..prompts).map(|place| place..place + 1).collect()),
        _ => {
            let message = format!("{pictures} pictures do not share out over {prompts} prompts");
            let hint = "give one picture, one for each prompt, or a placeholder for each in the prompts";
            Err(Failure::new(Exit::Refused, message).hint(Some(hint.into())))
        }
    }
}
