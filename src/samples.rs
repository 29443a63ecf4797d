//! Samples of what a model is used for, from the user's files: windows of prose, or prompts with pictures and answers.
use crate::engine_dir::EngineConfig;
use crate::processor::{Picture, Processor, ProcessorError, PromptRequest};
use crate::runtime::prompt_settings;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// What a model reads, and what it is to answer.
#[derive(Clone)]
pub struct Sample {
    pub pictures: Vec<Picture>,
    pub prompt: Vec<i32>,
    pub answer: Vec<i32>,
}

#[derive(Debug, Error)]
pub enum SampleError {
    #[error("cannot read `{}`", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("`{}`, line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
    #[error("`{}` holds no samples", path.display())]
    Empty { path: PathBuf },
    #[error(transparent)]
    Processor(#[from] ProcessorError),
}

impl SampleError {
    pub fn hint(&self) -> Option<String> {
        match self {
            SampleError::Processor(error) => error.hint(),
            SampleError::Line { .. } => {
                Some("a line is {\"prompt\": TEXT, \"answer\": TEXT, \"image\": FILE}, or {\"text\": TEXT}".into())
            }
            SampleError::Empty { .. } => Some("samples are read from .txt and .jsonl files".into()),
            SampleError::Read { .. } => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    text: Option<String>,
    prompt: Option<String>,
    #[serde(default)]
    answer: String,
    image: Option<PathBuf>,
}

/// Makes samples of one model.
pub struct Sampler<'m> {
    pub processor: &'m Processor,
    pub config: &'m EngineConfig,
    /// Tokens of a window of prose.
    pub window: usize,
}

impl Sampler<'_> {
    /// At most `limit` samples of a file, or of the files of a folder in the order of their names.
    ///
    /// # Errors
    /// What cannot be read, and what holds nothing.
    pub fn read(&self, path: &Path, limit: usize) -> Result<Vec<Sample>, SampleError> {
        let fail = |source| SampleError::Read { path: path.into(), source };
        let mut files = vec![path.to_path_buf()];
        if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(fail)?.collect::<Result<Vec<_>, _>>().map_err(fail)?;
            files = entries.into_iter().map(|entry| entry.path()).filter(|path| kind(path).is_some()).collect();
            files.sort();
        }
        let mut samples = Vec::new();
        for file in files {
            let text =
                std::fs::read_to_string(&file).map_err(|source| SampleError::Read { path: file.clone(), source })?;
            match kind(&file) {
                Some(Kind::Lines) => samples.extend(self.lines(&file, &text, limit.saturating_sub(samples.len()))?),
                _ => samples.extend(self.prose(&text)?),
            }
        }
        samples.truncate(limit);
        if samples.is_empty() { Err(SampleError::Empty { path: path.into() }) } else { Ok(samples) }
    }

    /// Whole windows of a text; all of a shorter one.
    fn prose(&self, text: &str) -> Result<Vec<Sample>, SampleError> {
        let tokens: Vec<i32> = self.processor.text.encode(text, true)?.iter().map(|&token| token as i32).collect();
        if tokens.len() < 2 {
            return Ok(Vec::new());
        }
        Ok(windows(&tokens, self.window.max(2).min(tokens.len())))
    }

    fn lines(&self, path: &Path, text: &str, limit: usize) -> Result<Vec<Sample>, SampleError> {
        let mut samples = Vec::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        for (number, line) in lines.take(limit) {
            let fail = |reason: String| SampleError::Line { path: path.into(), line: number + 1, reason };
            let line: Line = serde_json::from_str(line).map_err(|error| fail(error.to_string()))?;
            let picture = |image: &PathBuf| -> Result<Picture, SampleError> {
                let file = path.parent().unwrap_or(Path::new("")).join(image);
                let bytes = std::fs::read(&file).map_err(|error| fail(format!("`{}`: {error}", file.display())))?;
                Ok(Picture::decode(&bytes, &file.display().to_string())?)
            };
            let pictures = line.image.iter().map(picture).collect::<Result<Vec<_>, _>>()?;
            match (line.text, line.prompt) {
                (Some(text), None) if pictures.is_empty() => samples.extend(self.prose(&text)?),
                (None, Some(prompt)) => samples.push(self.asked(pictures, &prompt, &line.answer)?),
                _ => return Err(fail("wanted `prompt` or, without an image, `text`".into())),
            }
        }
        Ok(samples)
    }

    /// A question with its answer, which ends as answers do.
    ///
    /// # Errors
    /// A prompt that does not fit the pictures.
    pub fn asked(&self, pictures: Vec<Picture>, prompt: &str, answer: &str) -> Result<Sample, SampleError> {
        let settings = prompt_settings(self.config);
        let text = &self.processor.text;
        let request = PromptRequest { prompt, pictures: pictures.len(), first_picture: 0, add_special_tokens: true };
        let prompt = match self.config.reads_pages() {
            true => Vec::new(),
            false => settings.build(text, request)?.ids,
        };
        let mut answer: Vec<i32> = text.encode(answer, false)?.iter().map(|&token| token as i32).collect();
        answer.extend(text.eos_ids().first().map(|&end| end as i32));
        Ok(Sample { pictures, prompt, answer })
    }
}

/// Whole windows of at least two tokens, each of which answers what is before it.
pub fn windows(tokens: &[i32], window: usize) -> Vec<Sample> {
    let sample = |ids: &[i32]| Sample { pictures: Vec::new(), prompt: ids[..1].to_vec(), answer: ids[1..].to_vec() };
    tokens.chunks_exact(window.max(2)).map(sample).collect()
}

enum Kind {
    Prose,
    Lines,
}

fn kind(path: &Path) -> Option<Kind> {
    match path.extension()?.to_str()? {
        "txt" => Some(Kind::Prose),
        "jsonl" => Some(Kind::Lines),
        _ => None,
    }
}
