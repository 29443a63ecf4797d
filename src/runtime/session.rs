//! Questions in, answers out: pictures and prompts are prepared, a target's executor runs, ids become text.
use super::{Executor, FinishReason, GenerateOptions, RuntimeError, generate};
use crate::engine_dir::EngineConfig;
use crate::processor::{ChatMessage, PLACEHOLDER, Picture, Processor, PromptRequest, PromptSettings, PromptTemplate};
use serde::Serialize;
use std::ops::ControlFlow;
use std::time::Instant;

/// One prompt with its pictures.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub prompt: &'a str,
    pub pictures: &'a [Picture],
}

#[derive(Clone, Copy, Debug)]
pub struct AnswerOptions {
    /// As many as the checkpoint's generation config names and the engine makes, where nothing is asked for.
    pub max_new_tokens: Option<usize>,
    /// Put the prompt into the checkpoint's chat template.
    pub chat: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// New ids only.
    pub token_ids: Vec<u32>,
    /// Without special tokens and the blanks at both ends.
    pub text: String,
    pub finish_reason: FinishReason,
}

/// Wall-clock seconds of the parts of a run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Timings {
    pub preprocess_seconds: f64,
    pub vision_seconds: f64,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
}

/// A loaded model that answers.
pub struct Session {
    executor: Box<dyn Executor>,
    processor: Processor,
    config: EngineConfig,
}

impl Session {
    pub fn new(executor: Box<dyn Executor>, mut processor: Processor, config: EngineConfig) -> Session {
        if let Some(multimodal) = config.pretrained_config.multimodal {
            processor.image = processor.image.map(|image| image.with_aspect(multimodal.image_aspect_ratio));
        }
        Session { executor, processor, config }
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What stands for a picture in a prompt, if the model takes pictures.
    pub fn placeholder(&self) -> Option<String> {
        let multimodal = self.config.pretrained_config.multimodal?;
        match (multimodal.image_token_id, multimodal.prompt_template) {
            (Some(id), _) => self.processor.text.token(id as u32),
            (None, PromptTemplate::Vila) => Some(PLACEHOLDER.to_owned()),
            (None, _) => None,
        }
    }

    /// Answers all, as many at once as the engine takes. `on_text` sees pieces of text as they are made: the number of
    /// the ask and the piece.
    ///
    /// # Errors
    /// Pictures or prompts that do not fit, or a failing engine.
    pub fn answer(
        &mut self,
        asks: &[Ask<'_>],
        options: AnswerOptions,
        on_text: &mut dyn FnMut(usize, &str),
    ) -> Result<(Vec<Answer>, Timings), RuntimeError> {
        let mut answers = Vec::with_capacity(asks.len());
        let mut timings = Timings::default();
        for batch in asks.chunks(self.config.build_config.max_batch_size.max(1)) {
            let first = answers.len();
            let mut shifted = |request: usize, text: &str| on_text(first + request, text);
            answers.extend(self.batch(batch, options, &mut timings, &mut shifted)?);
        }
        Ok((answers, timings))
    }

    fn batch(
        &mut self,
        asks: &[Ask<'_>],
        options: AnswerOptions,
        timings: &mut Timings,
        on_text: &mut dyn FnMut(usize, &str),
    ) -> Result<Vec<Answer>, RuntimeError> {
        let limit = self.config.build_config.max_output_len;
        let wanted = options.max_new_tokens.unwrap_or_else(|| self.usual_length().min(limit));
        if wanted > limit {
            return Err(RuntimeError::TooManyTokens { found: wanted, limit });
        }
        self.processor.generation.rules.check(self.config.pretrained_config.vocab_size as u32)?;
        let start = Instant::now();
        let mut prompts = Vec::with_capacity(asks.len());
        let (mut pixels, mut pictures) = (Vec::new(), 0);
        for ask in asks {
            prompts.push(self.prompt(ask, pictures, options.chat)?);
            for picture in ask.pictures {
                let image = self.processor.image.as_ref().ok_or(RuntimeError::NoVision)?;
                self.check_size(image.size())?;
                pixels.extend(image.process(picture)?);
            }
            pictures += ask.pictures.len();
        }
        timings.prompt_tokens += prompts.iter().map(Vec::len).sum::<usize>();
        timings.preprocess_seconds += start.elapsed().as_secs_f64();
        if pictures > 0 {
            let start = Instant::now();
            self.executor.see(&pixels, pictures)?;
            timings.vision_seconds += start.elapsed().as_secs_f64();
        }
        let text = &self.processor.text;
        let mut streams: Vec<_> = asks.iter().map(|_| text.stream()).collect();
        let (mut failure, mut first_token) = (None, None);
        let options = GenerateOptions {
            max_new_tokens: wanted,
            end_ids: text.eos_ids(),
            rules: &self.processor.generation.rules,
            starts_alone: self.config.pretrained_config.decoder_start_token_id.is_some(),
        };
        let start = Instant::now();
        let mut on_token = |request: usize, token: u32| {
            first_token.get_or_insert_with(|| start.elapsed());
            match streams.get_mut(request).map(|stream| stream.push(token)) {
                Some(Ok(piece)) => {
                    on_text(request, &piece);
                    ControlFlow::Continue(())
                }
                Some(Err(error)) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
                None => ControlFlow::Continue(()),
            }
        };
        let generated = generate(self.executor.as_mut(), &prompts, options, &mut on_token)?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        let (total, prefill) = (start.elapsed(), first_token.unwrap_or_default());
        timings.prefill_seconds += prefill.as_secs_f64();
        timings.decode_seconds += total.saturating_sub(prefill).as_secs_f64();
        timings.new_tokens += generated.iter().map(|output| output.token_ids.len()).sum::<usize>();
        for (request, stream) in streams.iter_mut().enumerate() {
            on_text(request, &stream.finish()?);
        }
        let answer = |output: super::Generated| {
            let decoded = text.decode(&output.token_ids)?.trim().to_owned();
            Ok(Answer { token_ids: output.token_ids, text: decoded, finish_reason: output.finish_reason })
        };
        generated.into_iter().map(answer).collect()
    }

    /// New tokens of an answer by the generation config, which counts the token that a decoder starts with. Without an
    /// encoder it counts the prompt too, and what it says there is hardly ever meant.
    fn usual_length(&self) -> usize {
        let length = self
            .processor
            .generation
            .max_length
            .filter(|_| self.config.pretrained_config.decoder_start_token_id.is_some());
        length.map_or(usize::MAX, |length| length.saturating_sub(1))
    }

    fn prompt(&self, ask: &Ask<'_>, first_picture: usize, chat: bool) -> Result<Vec<i32>, RuntimeError> {
        let settings = prompt_settings(&self.config);
        let pictures = ask.pictures.len();
        if self.config.reads_pages() && !chat {
            return match (ask.prompt.trim(), pictures) {
                ("", 1) => {
                    Ok(self.config.pretrained_config.decoder_start_token_id.iter().map(|&id| id as i32).collect())
                }
                ("", found) => Err(RuntimeError::OnePicture { found }),
                _ => Err(RuntimeError::NoPrompt { prompt: ask.prompt.to_owned() }),
            };
        }
        let (prompt, add_special_tokens) = match (&self.processor.chat, chat) {
            (_, false) => (ask.prompt.to_owned(), true),
            (Some(template), true) => template.render(&[ChatMessage { role: "user", text: ask.prompt, pictures }])?,
            (None, true) => return Err(RuntimeError::NoChatTemplate),
        };
        let request = PromptRequest { prompt: &prompt, pictures, first_picture, add_special_tokens };
        Ok(settings.build(&self.processor.text, request)?.ids)
    }

    fn check_size(&self, found: Option<(usize, usize)>) -> Result<(), RuntimeError> {
        let wanted = self.config.pretrained_config.multimodal.map(|multimodal| multimodal.image_size);
        match (wanted, found) {
            (Some([height, width]), Some((found_height, found_width)))
                if (height, width) != (found_height, found_width) =>
            {
                Err(RuntimeError::PictureSize { found: [found_height, found_width], wanted: [height, width] })
            }
            _ => Ok(()),
        }
    }
}

/// What an engine's config says about prompts.
pub(crate) fn prompt_settings(config: &EngineConfig) -> PromptSettings {
    let EngineConfig { pretrained_config, build_config, .. } = config;
    let multimodal = pretrained_config.multimodal;
    PromptSettings {
        template: multimodal.map_or(PromptTemplate::Plain, |multimodal| multimodal.prompt_template),
        image_token_id: multimodal.and_then(|multimodal| multimodal.image_token_id).map(|id| id as u32),
        features_per_picture: multimodal.map_or(0, |multimodal| multimodal.num_visual_features),
        vocabulary: pretrained_config.vocab_size as u32,
        maximum_length: Some(build_config.max_input_len),
    }
}
