//! Running engines: prefill, decode, stop. It knows no family, only what `config.json` says.
mod choice;
mod processes;
mod ranks;
mod reference;
mod session;
mod tensorrt;
mod wire;

pub use processes::Process;
pub use ranks::{Placement, Ranks, Way};
pub use reference::{NETWORK, Reference, WEIGHTS};
pub(crate) use session::prompt_settings;
pub use session::{Answer, AnswerOptions, Ask, Session, Timings};
pub use tensorrt::{Tensorrt, Work, layers};
pub use wire::Wire;

use crate::engine_dir::{EngineConfig, Sizes};
use crate::processor::{ProcessorError, TokenRules};
use choice::Choice;
use graphs::Entry;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum RuntimeError {
    #[error("request {request} has {found} prompt tokens, the engine takes {limit}")]
    PromptTooLong { request: usize, found: usize, limit: usize },
    #[error("request {request} has no prompt tokens")]
    EmptyPrompt { request: usize },
    #[error("{found} requests in one call, the engine takes {limit}")]
    TooManyRequests { found: usize, limit: usize },
    #[error("the pictures fill {found} rows of the prompt table, the engine takes {limit}")]
    TooManyPictures { found: usize, limit: usize },
    #[error("{found} new tokens were asked for, the engine makes {limit}")]
    TooManyTokens { found: usize, limit: usize },
    #[error("the engine takes no pictures")]
    NoVision,
    #[error("pictures are prepared as {found:?} pixels (height, width), the engine takes {wanted:?}")]
    PictureSize { found: [usize; 2], wanted: [usize; 2] },
    #[error("a request has {found} pictures, this model reads exactly one")]
    OnePicture { found: usize },
    #[error("the prompt `{prompt}` was given, this model reads pictures only")]
    NoPrompt { prompt: String },
    #[error("the checkpoint has no chat template")]
    NoChatTemplate,
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    #[error("the engine's {what} does not fit its config")]
    Inconsistent { what: String },
    #[error(transparent)]
    Interpret(#[from] graphs::interpret::InterpretError),
    #[error(transparent)]
    Graph(#[from] graphs::GraphError),
    #[error(transparent)]
    Directory(#[from] crate::engine_dir::DirectoryError),
    #[error(transparent)]
    Weights(#[from] quant::QuantError),
    #[error(transparent)]
    Device(#[from] crate::device::DeviceError),
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
    #[error("TensorRT failed")]
    TensorRt(#[from] tensorrt_sys::Error),
    #[error(transparent)]
    Communicator(#[from] crate::plugins::CommunicatorError),
    /// What one rank says of another.
    #[error("{0}")]
    Ranks(String),
    #[error("rank {rank} cannot go on")]
    Rank { rank: usize, source: Box<RuntimeError> },
    #[error("rank {rank} has stopped")]
    RankStopped { rank: usize },
    #[error("the model has {ranks} ranks, there are {found} devices for them")]
    Devices { ranks: usize, found: usize },
    #[error("the engines were built by {built}; the library here is {here}")]
    OtherVersion { built: String, here: String, command: String },
    #[error("the engines were built for {built}; the GPU here is {here}")]
    OtherGpu { built: String, here: String, command: String },
}

impl RuntimeError {
    pub fn hint(&self) -> Option<String> {
        match self {
            RuntimeError::PromptTooLong { .. } => Some("build with a larger --max-input-len".into()),
            RuntimeError::TooManyRequests { .. } | RuntimeError::TooManyPictures { .. } => {
                Some("build with a larger --max-batch-size (or --max-multimodal-len), or send fewer at once".into())
            }
            RuntimeError::TooManyTokens { .. } => Some("build with a larger --max-output-len".into()),
            RuntimeError::NoVision => Some("leave --image out".into()),
            RuntimeError::PictureSize { .. } => {
                Some("preprocessor_config.json and config.json do not belong together".into())
            }
            RuntimeError::OnePicture { .. } => Some("give each page as a picture of its own with --image".into()),
            RuntimeError::NoPrompt { .. } => Some("leave --prompt out".into()),
            RuntimeError::NoChatTemplate => Some("leave --chat out".into()),
            RuntimeError::Processor(error) => error.hint(),
            RuntimeError::Directory(error) => error.hint(),
            RuntimeError::Graph(error) => error.hint(),
            RuntimeError::Device(error) => error.hint(),
            RuntimeError::Backend(error) => error.hint(),
            RuntimeError::TensorRt(error) => error.hint(),
            RuntimeError::Communicator(error) => error.hint(),
            RuntimeError::Rank { source, .. } => source.hint(),
            RuntimeError::Devices { .. } => Some("name the GPU of each rank: --devices 0,1 or, on one, 0,0".into()),
            RuntimeError::OtherVersion { command, .. } | RuntimeError::OtherGpu { command, .. } => {
                Some(format!("build them again here: `{command}`"))
            }
            _ => None,
        }
    }
}

/// A result of a network, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// What runs a model's networks, on any target. Token ids are picked greedily where the logits are.
pub trait Executor {
    /// Runs `count` pictures, pixels `[count, channels, height, width]`, and keeps their features as the prompt table.
    ///
    /// # Errors
    /// More pictures than the engine takes, or a failure of the engine.
    fn see(&mut self, pixels: &[f32], count: usize) -> Result<(), RuntimeError>;

    /// Starts a batch and gives the first new token of each prompt. A model that reads pictures in the place of prompts
    /// takes the one at the same place among those seen last; such a prompt only counts.
    ///
    /// # Errors
    /// Prompts that the engine does not take, or a failure of the engine.
    fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError>;

    /// Feeds each request the token that it was given last, for at least one step and at most `limit`, as many as cost
    /// least on the target; gives the next tokens of each step.
    ///
    /// # Errors
    /// A cache that is full, or a failure of the engine.
    fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError>;

    /// Lets the next step feed these tokens instead.
    ///
    /// # Errors
    /// A failure of the engine.
    fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError>;

    /// What the networks gave in the last call: `output` or `logits`, and results that were marked.
    ///
    /// # Errors
    /// A failure of the engine.
    fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError>;
}

/// Refuses prompts that an engine was not built for.
fn check_prompts(sizes: &Sizes, prompts: &[Vec<i32>]) -> Result<(), RuntimeError> {
    if prompts.len() > sizes.max_batch_size {
        return Err(RuntimeError::TooManyRequests { found: prompts.len(), limit: sizes.max_batch_size });
    }
    for (request, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(RuntimeError::EmptyPrompt { request });
        }
        if prompt.len() > sizes.max_input_len {
            let (found, limit) = (prompt.len(), sizes.max_input_len);
            return Err(RuntimeError::PromptTooLong { request, found, limit });
        }
    }
    Ok(())
}

impl EngineConfig {
    /// Whether a request is a picture and no prompt.
    pub fn reads_pages(&self) -> bool {
        self.pretrained_config.multimodal.is_some_and(|multimodal| multimodal.entry == Entry::Source)
    }

    /// Prompt table rows of one picture, where the table has room for so many.
    fn check_pictures(&self, count: usize) -> Result<usize, RuntimeError> {
        let features = self.pretrained_config.multimodal.ok_or(RuntimeError::NoVision)?.num_visual_features;
        let (found, limit) = (count * features, self.build_config.max_prompt_embedding_table_size);
        if found > limit { Err(RuntimeError::TooManyPictures { found, limit }) } else { Ok(features) }
    }

    /// Steps until the cache of one of the requests is full, at least one.
    fn room(&self, lengths: impl Iterator<Item = usize>) -> Result<usize, RuntimeError> {
        let limit = self.build_config.max_output_len;
        let room = self.build_config.max_seq_len.saturating_sub(lengths.max().unwrap_or(0));
        if room == 0 { Err(RuntimeError::TooManyTokens { found: limit + 1, limit }) } else { Ok(room) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token was made.
    Stop,
    /// As many tokens were made as were asked for.
    Length,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// New ids only; the end token is among them where one was made.
    pub token_ids: Vec<u32>,
    pub finish_reason: FinishReason,
}

/// How far and by which rules tokens are made.
#[derive(Clone, Copy, Debug)]
pub struct GenerateOptions<'a> {
    pub max_new_tokens: usize,
    pub end_ids: &'a [u32],
    pub rules: &'a TokenRules,
    /// Whether the decoder reads one token of its own before the first new one, and no prompt.
    pub starts_alone: bool,
}

/// Generates for every prompt until its end token or as many tokens as there may be. `on_token` sees each new token of each request
/// (its number, the id) as it is made and may stop the whole batch.
///
/// # Errors
/// Whatever the executor refuses.
pub fn generate(
    executor: &mut dyn Executor,
    prompts: &[Vec<i32>],
    options: GenerateOptions<'_>,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generated>, RuntimeError> {
    let GenerateOptions { max_new_tokens, end_ids, rules, starts_alone } = options;
    let unfinished = Generated { token_ids: Vec::new(), finish_reason: FinishReason::Length };
    let mut outputs = vec![unfinished; prompts.len()];
    if max_new_tokens == 0 || prompts.is_empty() {
        return Ok(outputs);
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let choice = Choice::new(rules, if starts_alone { 1 } else { longest }, max_new_tokens);
    let likeliest = executor.prefill(prompts)?;
    let mut steps = vec![choice.choose(executor, 0, likeliest)?];
    let mut made = 0;
    loop {
        for tokens in &steps {
            let last = choice.last(made);
            made += 1;
            for (request, (output, &token)) in std::iter::zip(&mut outputs, tokens).enumerate() {
                if output.finish_reason == FinishReason::Stop {
                    continue;
                }
                let given = last.unwrap_or(token);
                output.token_ids.push(given);
                // An end that is forced says only that there was no room for more.
                if end_ids.contains(&token) {
                    output.finish_reason = FinishReason::Stop;
                }
                if on_token(request, given).is_break() {
                    return Ok(outputs);
                }
            }
        }
        if made >= max_new_tokens || outputs.iter().all(|output| output.finish_reason == FinishReason::Stop) {
            break;
        }
        steps = match choice.is_own(made) {
            true => {
                let likeliest = executor.decode(1)?.into_iter().next().unwrap_or_default();
                vec![choice.choose(executor, made, likeliest)?]
            }
            false => executor.decode(max_new_tokens - made)?,
        };
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up from each prompt's first id, two steps at a time.
    struct Counter(Vec<u32>);

    impl Executor for Counter {
        fn see(&mut self, _: &[f32], _: usize) -> Result<(), RuntimeError> {
            Err(RuntimeError::NoVision)
        }

        fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<u32>, RuntimeError> {
            self.0 = prompts.iter().map(|prompt| prompt[0] as u32 + 1).collect();
            Ok(self.0.clone())
        }

        fn decode(&mut self, limit: usize) -> Result<Vec<Vec<u32>>, RuntimeError> {
            let mut step = || {
                self.0.iter_mut().for_each(|token| *token += 1);
                self.0.clone()
            };
            Ok((0..limit.min(2)).map(|_| step()).collect())
        }

        fn force(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
            self.0 = tokens.to_vec();
            Ok(())
        }

        fn outputs(&mut self) -> Result<BTreeMap<String, Output>, RuntimeError> {
            Ok(BTreeMap::new())
        }
    }

    fn plain(max_new_tokens: usize, end_ids: &[u32]) -> GenerateOptions<'_> {
        const NONE: &TokenRules =
            &TokenRules { forced_first: None, forced_last: None, suppressed: vec![], suppressed_first: vec![] };
        GenerateOptions { max_new_tokens, end_ids, rules: NONE, starts_alone: false }
    }

    #[test]
    fn forced_tokens_take_the_place_of_others() {
        let rules = TokenRules { forced_first: Some(20), forced_last: Some(9), ..TokenRules::default() };
        let ids = |prompt: Vec<i32>, starts_alone: bool| {
            let options = GenerateOptions { rules: &rules, starts_alone, ..plain(4, &[9]) };
            let output = generate(&mut Counter(vec![]), &[prompt], options, &mut |_, _| ControlFlow::Continue(()));
            output.unwrap().remove(0)
        };
        let cut = |token_ids: &[u32]| Generated { token_ids: token_ids.to_vec(), finish_reason: FinishReason::Length };
        assert_eq!(ids(vec![1, 5], true), cut(&[20, 21, 22, 9]));
        assert_eq!(ids(vec![1], false), cut(&[20, 21, 22, 9]));
        // A decoder that has read a prompt is not at its beginning.
        assert_eq!(ids(vec![1, 5], false), cut(&[2, 3, 4, 9]));
        let stop = Generated { token_ids: vec![8, 9], finish_reason: FinishReason::Stop };
        assert_eq!(ids(vec![7, 5], false), stop);
    }

    #[test]
    fn each_request_ends_by_itself() {
        let mut seen = Vec::new();
        let mut on_token = |request, token| {
            seen.push((request, token));
            ControlFlow::Continue(())
        };
        let outputs = generate(&mut Counter(vec![]), &[vec![1], vec![7]], plain(4, &[9]), &mut on_token).unwrap();
        let stop = Generated { token_ids: vec![8, 9], finish_reason: FinishReason::Stop };
        let length = Generated { token_ids: vec![2, 3, 4, 5], finish_reason: FinishReason::Length };
        assert_eq!(outputs, [length, stop]);
        assert_eq!(seen, [(0, 2), (1, 8), (0, 3), (1, 9), (0, 4), (0, 5)]);
    }

    #[test]
    fn the_caller_may_stop() {
        let outputs = generate(&mut Counter(vec![]), &[vec![1]], plain(9, &[]), &mut |_, token| {
            if token == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(outputs.unwrap()[0].token_ids, [2, 3]);
    }
}
