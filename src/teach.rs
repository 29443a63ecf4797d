//! Runs a model's networks over whole samples at once, answers included (teacher forcing), whoever runs them.
use crate::lower::LOGITS;
use crate::processor::{ImageProcessor, ProcessorError};
use crate::samples::Sample;
use graphs::interpret::{Array, InterpretError};
use graphs::{Facts, Network};
use std::collections::BTreeMap;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum TeachError {
    #[error(transparent)]
    Interpret(#[from] InterpretError),
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    #[error("the samples have pictures, and the model reads none")]
    NoVision,
    #[error("the `{0}` network does not give what follows from it")]
    Inconsistent(&'static str),
}

/// Inputs or outputs of a network by name.
pub type Arrays = BTreeMap<String, Array>;

/// Runs the network of a name over the inputs of several samples.
pub type Run<'r> = dyn FnMut(&str, Vec<Arrays>) -> Result<Vec<Arrays>, InterpretError> + 'r;

/// What is known of a model besides its networks.
pub struct Lesson<'m> {
    pub networks: Vec<&'m Network>,
    pub facts: Facts,
    pub image: Option<ImageProcessor>,
}

impl Lesson<'_> {
    /// What the language network gives for each sample; see [`Lesson::scored`].
    ///
    /// # Errors
    /// Samples that do not fit the model, and whatever `run` refuses.
    pub fn teach(&self, samples: &[Sample], run: &mut Run<'_>) -> Result<Vec<Array>, TeachError> {
        let has = |name: &str| self.networks.iter().any(|network| network.name == name);
        let tables = self.tables(samples, run)?;
        let asked = samples.iter().zip(tables);
        let outputs = if has("cross") {
            let encoded = if has("encoder") {
                let inputs = asked.map(|(sample, table)| {
                    BTreeMap::from([
                        ("input_ids".to_owned(), row(sample.prompt.clone())),
                        ("position_ids".to_owned(), row((0..sample.prompt.len() as i32).collect())),
                        ("source_lengths".to_owned(), Array::int([1], vec![sample.prompt.len() as i32])),
                        ("prompt_embedding_table".to_owned(), table),
                    ])
                });
                run("encoder", inputs.collect())?
            } else {
                // A page's features are what an encoder would give.
                let seen = |table: Array| Array { shape: [&[1], &table.shape[..]].concat(), data: table.data };
                asked.map(|(_, table)| BTreeMap::from([("encoder_output".to_owned(), seen(table))])).collect()
            };
            let read = run("cross", encoded)?;
            let start = self.facts.decoder_start_id.unwrap_or(0) as i32;
            let inputs = samples.iter().zip(read).map(|(sample, read)| {
                let ids = std::iter::once(start).chain(sample.answer.iter().copied()).collect();
                let mut inputs = self.decoding(ids);
                inputs.extend(read);
                inputs.insert("source_lengths".to_owned(), Array::int([1], vec![sample.prompt.len() as i32]));
                inputs
            });
            run("decoder", inputs.collect())?
        } else {
            let inputs = asked.map(|(sample, table)| {
                let mut inputs = self.decoding([&sample.prompt[..], &sample.answer].concat());
                inputs.insert("prompt_embedding_table".to_owned(), table);
                inputs
            });
            run("language", inputs.collect())?
        };
        let logits = |mut output: Arrays| output.remove(LOGITS).ok_or(TeachError::Inconsistent("language"));
        outputs.into_iter().map(logits).collect()
    }

    /// Rows of all logits that say what an answer's tokens are, with those tokens: row, token.
    pub fn scored(&self, sample: &Sample) -> Vec<(usize, i32)> {
        let encodes = self.networks.iter().any(|network| network.name == "cross");
        let first = if encodes { 0 } else { sample.prompt.len().saturating_sub(1) };
        sample.answer.iter().enumerate().map(|(number, &token)| (first + number, token)).collect()
    }

    /// Each sample's prompt table; one row of zeros without pictures.
    fn tables(&self, samples: &[Sample], run: &mut Run<'_>) -> Result<Vec<Array>, TeachError> {
        let hidden = self.facts.hidden;
        let mut tables = vec![Array::float([1, hidden], vec![0.0; hidden]); samples.len()];
        let seeing: Vec<usize> = (0..samples.len()).filter(|&at| !samples[at].pictures.is_empty()).collect();
        if seeing.is_empty() {
            return Ok(tables);
        }
        let (image, facts) = self.image.as_ref().zip(self.facts.pictures).ok_or(TeachError::NoVision)?;
        let inputs = seeing.iter().map(|&at| {
            let pictures = &samples[at].pictures;
            let pixels = pictures.iter().map(|picture| image.process(picture)).collect::<Result<Vec<_>, _>>()?.concat();
            let [height, width] = facts.size;
            let channels = pixels.len() / (pictures.len() * height * width).max(1);
            let pixels = Array::float([pictures.len(), channels, height, width], pixels);
            Ok(BTreeMap::from([("input".to_owned(), pixels)]))
        });
        let outputs = run("vision", inputs.collect::<Result<_, TeachError>>()?)?;
        for (at, mut output) in seeing.into_iter().zip(outputs) {
            let features = output.remove("output").ok_or(TeachError::Inconsistent("vision"))?;
            tables[at] = Array { shape: vec![features.len() / hidden.max(1), hidden], data: features.data };
        }
        Ok(tables)
    }

    /// Inputs of a network with a cache that read `ids` at once.
    fn decoding(&self, ids: Vec<i32>) -> Arrays {
        let count = ids.len() as i32;
        BTreeMap::from([
            ("input_ids".to_owned(), row(ids)),
            ("position_ids".to_owned(), row((0..count).collect())),
            ("past_lengths".to_owned(), Array::int([1], vec![0])),
            ("sequence_lengths".to_owned(), Array::int([1], vec![count])),
            ("last_token_ids".to_owned(), Array::int([1], vec![count - 1])),
        ])
    }
}

fn row(ids: Vec<i32>) -> Array {
    Array::int([1, ids.len()], ids)
}
