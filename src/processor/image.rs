//! A picture to the vision network's `pixel_values`, as HF's image processors of the PIL kind do it.

use graphs::Aspect;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::ProcessorError;
use super::page;
use super::picture::{MAXIMUM_PIXELS, MAXIMUM_SIDE, Picture};
use super::resize::{Filter, resize};

/// One change of a picture's pixels, in u8.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Resample.
    Resize { to: ResizeTo, filter: Filter },
    /// Cut the middle out; where the picture is smaller, black is added around it.
    CenterCrop { height: usize, width: usize },
    /// Centre on a square of the longer side, filled with `fill` (original LLaVA, VILA 1.0).
    PadToSquare { fill: [u8; 3] },
    /// Cut bright margins off (Nougat).
    CropMargin,
    /// Turn a picture that lies across a page of this size.
    AlignLongAxis { height: usize, width: usize },
    /// Make smaller what does not fit.
    Thumbnail { height: usize, width: usize },
    /// Centre on black; what does not fit is refused.
    CenterPad { height: usize, width: usize },
}

/// What size a resize aims at, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeTo {
    /// Exactly this, whatever happens to the proportions.
    Exact { height: usize, width: usize },
    /// The shorter side becomes this, the longer one follows, rounded down.
    ShortestEdge(usize),
}

/// The steps and the normalization of one checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageProcessor {
    /// In order of application.
    pub steps: Vec<Step>,
    /// What a byte is multiplied by.
    pub rescale: Option<f64>,
    /// Mean and standard deviation of each channel, after the rescaling.
    pub normalize: Option<Normalization>,
}

/// Mean and standard deviation of the red, green and blue channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// The image processors whose defaults are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Clip,
    Blip,
    Siglip,
    Nougat,
}

const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

impl Kind {
    fn from_settings(settings: &Settings<'_>) -> Result<Self, ProcessorError> {
        let name = ["image_processor_type", "feature_extractor_type"];
        let Some((setting, found)) = name.iter().find_map(|name| Some((*name, settings.values.get(*name)?.as_str()?)))
        else {
            return Err(settings.wrong("image_processor_type", None, "a name"));
        };
        let stem = ["ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor"]
            .iter()
            .find_map(|ending| found.strip_suffix(ending));
        match stem {
            Some("CLIP") => Ok(Self::Clip),
            Some("Blip") => Ok(Self::Blip),
            Some("Siglip") => Ok(Self::Siglip),
            Some("Nougat") => Ok(Self::Nougat),
            _ => Err(settings.wrong(
                setting,
                settings.values.get(setting),
                "CLIPImageProcessor, BlipImageProcessor, SiglipImageProcessor or NougatImageProcessor",
            )),
        }
    }

    fn default_size(self) -> ResizeTo {
        match self {
            Self::Clip => ResizeTo::ShortestEdge(224),
            Self::Blip => exact(384),
            Self::Siglip => exact(224),
            Self::Nougat => ResizeTo::Exact { height: 896, width: 672 },
        }
    }

    fn default_normalization(self) -> Normalization {
        match self {
            Self::Clip | Self::Blip => Normalization { mean: CLIP_MEAN, std: CLIP_STD },
            Self::Siglip => Normalization { mean: [0.5; 3], std: [0.5; 3] },
            Self::Nougat => Normalization { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] },
        }
    }
}

fn exact(side: usize) -> ResizeTo {
    ResizeTo::Exact { height: side, width: side }
}

impl ImageProcessor {
    /// Reads preprocessor_config.json (4.x) or the `image_processor` of processor_config.json (5.x), which wins
    /// where both are there, as in HF.
    ///
    /// # Errors
    /// Neither is there, the kind of image processor is not known, a setting cannot be followed, or the steps leave
    /// the output size open.
    pub fn from_configs(preprocessor: Option<&Value>, processor: Option<&Value>) -> Result<Self, ProcessorError> {
        let nested = processor.and_then(|processor| processor.get("image_processor"));
        let settings = match (nested, preprocessor) {
            (Some(values), _) => Settings { file: "processor_config.json", values },
            (None, Some(values)) => Settings { file: "preprocessor_config.json", values },
            (None, None) => {
                return Err(ProcessorError::Setting {
                    file: "preprocessor_config.json",
                    setting: "image_processor_type".to_owned(),
                    found: "no file".to_owned(),
                    wanted: "the settings of an image processor".to_owned(),
                });
            }
        };
        let kind = Kind::from_settings(&settings)?;
        let steps = if kind == Kind::Nougat { settings.page_steps()? } else { settings.steps(kind)? };
        let rescale = match settings.flag("do_rescale", true)? {
            true => Some(settings.number("rescale_factor", 1.0 / 255.0)?),
            false => None,
        };
        let normalize = match settings.flag("do_normalize", true)? {
            true => {
                let default = kind.default_normalization();
                Some(Normalization {
                    mean: settings.channels("image_mean", default.mean)?,
                    std: settings.channels("image_std", default.std)?,
                })
            }
            false => None,
        };
        let processor = Self { steps, rescale, normalize };
        if processor.size().is_none() {
            return Err(settings.wrong("size", settings.values.get("size"), "a fixed height and width"));
        }
        Ok(processor)
    }

    /// The same with what config.json's `image_aspect_ratio` asks for done to a picture first.
    #[must_use]
    pub fn with_aspect(mut self, aspect: Aspect) -> Self {
        match (aspect, self.size()) {
            (Aspect::Pad, _) => self.with_square_padding(),
            (Aspect::Resize, Some((height, width))) => {
                // VILA leaves the filter to Pillow, whose default this is.
                let to = ResizeTo::Exact { height, width };
                self.steps.insert(0, Step::Resize { to, filter: Filter::Bicubic });
                self
            }
            (Aspect::Processor, _) | (Aspect::Resize, None) => self,
        }
    }

    /// The same with pictures first put on a square of the mean colour, for models whose config.json says
    /// `image_aspect_ratio: pad`.
    #[must_use]
    pub fn with_square_padding(mut self) -> Self {
        let mean = self.normalize.map_or([0.0; 3], |normalize| normalize.mean);
        // In f64 and truncated, as Python's int(x * 255).
        let fill = mean.map(|mean| (decimal(mean) * 255.0) as u8);
        self.steps.insert(0, Step::PadToSquare { fill });
        self
    }

    /// Height and width of the output in pixels; `None` where they would depend on the picture.
    pub fn size(&self) -> Option<(usize, usize)> {
        match self.steps.last()? {
            Step::CenterCrop { height, width } | Step::CenterPad { height, width } => Some((*height, *width)),
            Step::Resize { to: ResizeTo::Exact { height, width }, .. } => Some((*height, *width)),
            Step::Resize { to: ResizeTo::ShortestEdge(side), .. } => {
                let square = matches!(self.steps.iter().rev().nth(1), Some(Step::PadToSquare { .. }));
                square.then_some((*side, *side))
            }
            Step::PadToSquare { .. } | Step::CropMargin | Step::AlignLongAxis { .. } | Step::Thumbnail { .. } => None,
        }
    }

    /// The steps alone: the picture the network sees, in u8.
    ///
    /// # Errors
    /// A step would make the picture larger than 8 times 64 Mpx.
    pub fn prepare(&self, picture: &Picture) -> Result<Picture, ProcessorError> {
        let mut picture = picture.clone();
        for step in &self.steps {
            picture = match step {
                Step::Resize { to, filter } => {
                    let (height, width) = target(*to, &picture)?;
                    resize(&picture, width, height, *filter)
                }
                Step::CenterCrop { height, width } => center(&picture, *height, *width, [0; 3]),
                Step::PadToSquare { fill } => square(&picture, *fill),
                Step::CropMargin => page::crop_margin(&picture),
                Step::AlignLongAxis { height, width } => page::align_long_axis(picture, *height, *width),
                Step::Thumbnail { height, width } => page::thumbnail(&picture, *height, *width)?,
                Step::CenterPad { height, width } => page::frame(&picture, *height, *width)?,
            };
        }
        Ok(picture)
    }

    /// `pixel_values` of one picture: f32 `[3, height, width]`, row major.
    ///
    /// # Errors
    /// As [`ImageProcessor::prepare`].
    pub fn process(&self, picture: &Picture) -> Result<Vec<f32>, ProcessorError> {
        let prepared = self.prepare(picture)?;
        let pixels = prepared.width * prepared.height;
        let mut values = Vec::with_capacity(pixels * 3);
        for channel in 0..3 {
            // HF multiplies in f64, rounds to f32, and normalizes in f32; a byte has 256 results.
            let table: Vec<f32> = (0..=255u8)
                .map(|byte| {
                    let scaled = self.rescale.map_or(f32::from(byte), |scale| (f64::from(byte) * scale) as f32);
                    self.normalize
                        .map_or(scaled, |normalize| (scaled - normalize.mean[channel]) / normalize.std[channel])
                })
                .collect();
            values.extend(prepared.rgb.chunks_exact(3).map(|pixel| table[usize::from(pixel[channel])]));
        }
        Ok(values)
    }
}

/// The decimal number that the configuration file held, before it was rounded to f32.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn target(to: ResizeTo, picture: &Picture) -> Result<(usize, usize), ProcessorError> {
    let (height, width) = match to {
        ResizeTo::Exact { height, width } => (height, width),
        ResizeTo::ShortestEdge(side) => {
            let (short, long) = (picture.width.min(picture.height), picture.width.max(picture.height));
            let long = side.saturating_mul(long) / short.max(1);
            if picture.width <= picture.height { (long, side) } else { (side, long) }
        }
    };
    let fits = height.checked_mul(width).is_some_and(|pixels| pixels as u64 <= 8 * MAXIMUM_PIXELS);
    if !fits {
        let (from_width, from_height) = (picture.width, picture.height);
        return Err(ProcessorError::picture(
            format!("{from_width} x {from_height} pixels"),
            format!("found `{width}` x `{height}` pixels after its resize, too many"),
        ));
    }
    Ok((height, width))
}

/// The middle `height` x `width` of a picture; what lies outside of it is `fill`.
fn center(picture: &Picture, height: usize, width: usize, fill: [u8; 3]) -> Picture {
    // HF rounds an odd difference down, towards minus infinity where the picture is the smaller one.
    let offset = |from: usize, to: usize| (from as i64 - to as i64).div_euclid(2);
    let (top, left) = (offset(picture.height, height), offset(picture.width, width));
    let source = |at: usize, offset: i64, limit: usize| {
        let at = usize::try_from(at as i64 + offset).ok()?;
        (at < limit).then_some(at)
    };
    let mut rgb = Vec::with_capacity(height * width * 3);
    for y in 0..height {
        for x in 0..width {
            let pixel = source(y, top, picture.height).zip(source(x, left, picture.width));
            match pixel.and_then(|(y, x)| picture.rgb.get((y * picture.width + x) * 3..)?.first_chunk::<3>()) {
                Some(pixel) => rgb.extend_from_slice(pixel),
                None => rgb.extend_from_slice(&fill),
            }
        }
    }
    Picture { width, height, rgb }
}

/// The picture on a square; an odd difference leaves the smaller part before it.
fn square(picture: &Picture, fill: [u8; 3]) -> Picture {
    let side = picture.width.max(picture.height);
    let (top, left) = ((side - picture.height) / 2, (side - picture.width) / 2);
    let mut rgb = fill.repeat(side * side);
    for (y, row) in picture.rgb.chunks_exact(picture.width * 3).enumerate() {
        let start = ((top + y) * side + left) * 3;
        rgb[start..start + row.len()].copy_from_slice(row);
    }
    Picture { width: side, height: side, rgb }
}

/// The settings of an image processor and the file they come from.
struct Settings<'a> {
    file: &'static str,
    values: &'a Value,
}

impl Settings<'_> {
    fn wrong(&self, setting: &str, found: Option<&Value>, wanted: &str) -> ProcessorError {
        let found = found.map_or("nothing".to_owned(), Value::to_string);
        ProcessorError::Setting {
            file: self.file,
            setting: setting.to_owned(),
            found: found.chars().take(200).collect(),
            wanted: wanted.to_owned(),
        }
    }

    /// A setting; one that is null counts as absent.
    fn get(&self, setting: &str) -> Option<&Value> {
        self.values.get(setting).filter(|value| !value.is_null())
    }

    fn flag(&self, setting: &str, default: bool) -> Result<bool, ProcessorError> {
        self.get(setting).map_or(Ok(default), |value| {
            value.as_bool().ok_or_else(|| self.wrong(setting, Some(value), "true or false"))
        })
    }

    fn number(&self, setting: &str, default: f64) -> Result<f64, ProcessorError> {
        self.get(setting).map_or(Ok(default), |value| {
            let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
            number.ok_or_else(|| self.wrong(setting, Some(value), "a number above 0"))
        })
    }

    fn channels(&self, setting: &str, default: [f32; 3]) -> Result<[f32; 3], ProcessorError> {
        let Some(value) = self.get(setting) else {
            return Ok(default);
        };
        let wrong = || self.wrong(setting, Some(value), "three numbers, not 0 in image_std");
        let given = match value {
            Value::Array(items) => items.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>(),
            _ => value.as_f64().map(|number| vec![number; 3]),
        };
        let numbers: [f64; 3] = given.and_then(|numbers| numbers.try_into().ok()).ok_or_else(wrong)?;
        let numbers = numbers.map(|number| number as f32);
        if setting == "image_std" && numbers.contains(&0.0) {
            return Err(wrong());
        }
        Ok(numbers)
    }

    fn side(&self, setting: &str, value: &Value) -> Result<usize, ProcessorError> {
        let side = value.as_u64().filter(|side| (1..=u64::from(MAXIMUM_SIDE)).contains(side));
        side.and_then(|side| usize::try_from(side).ok())
            .ok_or_else(|| self.wrong(setting, Some(value), "1 to 8192 pixels"))
    }

    /// `{"height", "width"}`; `None` where the keys are others.
    fn height_and_width(&self, setting: &str, value: &Value) -> Result<Option<(usize, usize)>, ProcessorError> {
        match (value.get("height"), value.get("width")) {
            (Some(height), Some(width)) if !height.is_null() && !width.is_null() => {
                Ok(Some((self.side(setting, height)?, self.side(setting, width)?)))
            }
            _ => Ok(None),
        }
    }

    fn steps(&self, kind: Kind) -> Result<Vec<Step>, ProcessorError> {
        let mut steps = Vec::new();
        if self.flag("do_resize", true)? {
            steps.push(Step::Resize { to: self.resize_to(kind)?, filter: self.filter(Filter::Bicubic)? });
        }
        if self.flag("do_center_crop", kind == Kind::Clip)? {
            let (height, width) = self.crop_size()?;
            steps.push(Step::CenterCrop { height, width });
        }
        if self.flag("do_pad", false)? {
            return Err(self.wrong("do_pad", self.values.get("do_pad"), "false"));
        }
        Ok(steps)
    }

    /// Nougat's, all about one size.
    fn page_steps(&self) -> Result<Vec<Step>, ProcessorError> {
        let ResizeTo::Exact { height, width } = self.resize_to(Kind::Nougat)? else {
            return Err(self.wrong("size", self.values.get("size"), "height and width"));
        };
        let filter = self.filter(Filter::Bilinear)?;
        let steps = [
            ("do_crop_margin", true, Step::CropMargin),
            ("do_align_long_axis", false, Step::AlignLongAxis { height, width }),
            ("do_resize", true, Step::Resize { to: ResizeTo::ShortestEdge(height.min(width)), filter }),
            ("do_thumbnail", true, Step::Thumbnail { height, width }),
            ("do_pad", true, Step::CenterPad { height, width }),
        ];
        let mut wanted = Vec::new();
        for (flag, default, step) in steps {
            if self.flag(flag, default)? {
                wanted.push(step);
            }
        }
        Ok(wanted)
    }

    fn resize_to(&self, kind: Kind) -> Result<ResizeTo, ProcessorError> {
        let Some(value) = self.get("size") else {
            return Ok(kind.default_size());
        };
        if value.is_number() {
            let side = self.side("size", value)?;
            return Ok(match kind {
                Kind::Clip => ResizeTo::ShortestEdge(side),
                Kind::Blip | Kind::Siglip | Kind::Nougat => exact(side),
            });
        }
        if let Some((height, width)) = self.height_and_width("size", value)? {
            return Ok(ResizeTo::Exact { height, width });
        }
        let longest = value.get("longest_edge").filter(|value| !value.is_null());
        match (value.get("shortest_edge"), longest) {
            (Some(side), None) => Ok(ResizeTo::ShortestEdge(self.side("size", side)?)),
            _ => Err(self.wrong("size", Some(value), "height and width, or shortest_edge, or a number")),
        }
    }

    fn crop_size(&self) -> Result<(usize, usize), ProcessorError> {
        match self.get("crop_size") {
            None => Ok((224, 224)),
            Some(value) if value.is_number() => {
                let side = self.side("crop_size", value)?;
                Ok((side, side))
            }
            Some(value) => self
                .height_and_width("crop_size", value)?
                .ok_or_else(|| self.wrong("crop_size", Some(value), "height and width, or a number")),
        }
    }

    fn filter(&self, default: Filter) -> Result<Filter, ProcessorError> {
        self.get("resample").map_or(Ok(default), |value| {
            let filter = value.as_u64().and_then(Filter::from_number);
            filter.ok_or_else(|| self.wrong("resample", Some(value), "one of Pillow's filters, 0 to 5"))
        })
    }
}
