//! Donut's Swin transformer, which reads pages in windows (Liu et al. 2021, arXiv 2103.14030; Donut: Kim et al. 2021,
//! 2111.15664). Names and semantics of `transformers/models/donut/modeling_donut_swin.py`.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Heads, Scope, Tensor, Weight, WindowBias};

/// PyTorch's default, of the norms that no config names.
const EPSILON: f32 = 1e-5;
/// Pixels beyond this are those of no page; the bound keeps products of sizes far from overflow.
const LARGEST_SIDE: usize = 1 << 16;
const LARGEST_WIDTH: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq)]
pub struct DonutSwin {
    /// Height and width of a page, in pixels.
    pub image_size: [usize; 2],
    pub patch: usize,
    pub channels: usize,
    pub stages: Vec<Stage>,
    /// Places along one side of a window.
    pub window: usize,
    pub qkv_bias: bool,
    pub activation: ActivationKind,
    /// Of the norms in blocks.
    pub epsilon: f32,
}

/// Blocks at one resolution.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    pub width: usize,
    pub ffn: usize,
    pub blocks: usize,
    pub heads: usize,
    /// Places down and across.
    pub grid: [usize; 2],
}

impl DonutSwin {
    /// Buffers that files hold besides the weights.
    pub(crate) fn ignores(name: &str) -> bool {
        name.ends_with(".relative_position_index")
    }

    /// Missing keys take the defaults of `DonutSwinConfig`.
    pub(crate) fn from_config(keys: &Keys) -> Result<DonutSwin, GraphError> {
        let image_size = keys.sides("image_size", 224)?;
        let [patch, across] = keys.sides("patch_size", 4)?;
        if patch != across {
            return Err(keys.fault("patch_size", format!("patches of {patch} x {across} are not supported")));
        }
        if image_size.into_iter().any(|side| side < patch || side > LARGEST_SIDE) {
            let reason = format!("{image_size:?}, wanted sides from {patch}, the patch_size, to {LARGEST_SIDE}");
            return Err(keys.fault("image_size", reason));
        }
        if keys.flag("use_absolute_embeddings", false)? {
            return Err(keys.fault("use_absolute_embeddings", "position embeddings are not supported".into()));
        }
        let swin = DonutSwin {
            image_size,
            patch,
            channels: keys.size("num_channels", 3)?,
            stages: stages(keys, image_size.map(|side| side.div_ceil(patch)))?,
            window: keys.size("window_size", 7)?,
            qkv_bias: keys.flag("qkv_bias", true)?,
            activation: keys.activation("hidden_act", "gelu")?,
            epsilon: keys.positive("layer_norm_eps", EPSILON)?,
        };
        // Transformers shrinks such a window, but not its table of biases, and fails.
        match swin.stages.iter().find(|stage| stage.grid.into_iter().any(|places| places < swin.window)) {
            Some(Stage { grid: [height, width], .. }) => {
                let reason = format!("a window of {} does not fit {height} x {width} patches", swin.window);
                Err(keys.fault("window_size", reason))
            }
            None => Ok(swin),
        }
    }

    /// Height and width of the last stage: features of one page, and how wide each is.
    pub(crate) fn output(&self) -> (usize, usize) {
        self.stages.last().map_or((0, 0), |stage| (stage.grid[0] * stage.grid[1], stage.width))
    }

    /// Pixels `[batch, channels, height, width]` to `[batch, features, width]` of the last stage; there is no norm at the
    /// end.
    pub(crate) fn write<'g>(&self, s: &Scope<'g>, pixels: Tensor<'g>) -> Tensor<'g> {
        let embeddings = s.sub("embeddings");
        let patches = embeddings.sub("patch_embeddings");
        let [height, width] = self.image_size.map(|side| side.next_multiple_of(self.patch) - side);
        let mut x = padded(padded(pixels, 2, height), 3, width);
        for (number, stage) in self.stages.iter().enumerate() {
            let (batch, places) = (x.ty().shape[0], stage.grid[0] * stage.grid[1]);
            let s = s.layer("encoder.layers", number);
            if number == 0 {
                let seen = patches.patches("projection", stage.width, self.patch, x);
                let seen = seen.reshape([batch, stage.width.into(), places.into()]).transpose(&[0, 2, 1]);
                let seen = patches.add_parameter("projection.bias", &[stage.width], seen);
                x = embeddings.layer_norm("norm", EPSILON).of(seen);
            }
            for block in 0..stage.blocks {
                let shifted = block % 2 == 1;
                x = self.block(&s.layer("blocks", block), stage, shifted, x);
            }
            if number + 1 < self.stages.len() {
                x = stage.merge(&s.sub("downsample"), x);
            }
        }
        x
    }

    fn block<'g>(&self, s: &Scope<'g>, stage: &Stage, shifted: bool, x: Tensor<'g>) -> Tensor<'g> {
        let x =
            x + self.attend(&s.sub("attention"), stage, shifted, s.layer_norm("layernorm_before", self.epsilon).of(x));
        let normed = s.layer_norm("layernorm_after", self.epsilon).of(x);
        let wide = s.linear("intermediate.dense", stage.ffn).bias().column().of(normed).activation(self.activation);
        x + s.linear("output.dense", stage.width).bias().row().of(wide)
    }

    /// Attention inside of windows. What pads the last windows takes part as keys, in the norm's place.
    fn attend<'g>(&self, s: &Scope<'g>, stage: &Stage, shifted: bool, x: Tensor<'g>) -> Tensor<'g> {
        let (side, width, batch) = (self.window, stage.width, x.ty().shape[0]);
        let [rows, columns] = stage.grid.map(|places| places.div_ceil(side));
        let [height, across] = [rows * side, columns * side];
        // A grid of one window has no neighbours to look at.
        let shift = if shifted && stage.grid.into_iter().all(|places| places > side) { side / 2 } else { 0 };
        let (windows, places) = (rows * columns, side * side);
        let sizes =
            |sizes: &[usize]| std::iter::once(batch).chain(sizes.iter().map(|&size| size.into())).collect::<Vec<_>>();

        let x = x.reshape(sizes(&[stage.grid[0], stage.grid[1], width]));
        let x = padded(padded(x, 1, height - stage.grid[0]), 2, across - stage.grid[1]);
        let x = rolled(x, [shift, shift]).reshape(sizes(&[rows, side, columns, side, width]));
        let x = x.transpose(&[0, 2, 4, 1, 3, 5]).reshape(sizes(&[places * windows, width]));
        let own = s.sub("self");
        let [q, k, v] = ["query", "key", "value"].map(|name| {
            let projected = own.linear(name, width).bias_if(self.qkv_bias).column().of(x);
            projected.reshape(sizes(&[places, windows * width]))
        });
        let table = [(2 * side - 1).pow(2), stage.heads];
        let weight = Weight::tensor(own.name("relative_position_bias_table"), &table);
        let bias = WindowBias { weight, side, grid: [rows, columns], shift };
        let all = windows * stage.heads;
        let heads = Heads { query: all, key_value: all, dim: width / stage.heads };
        let mixed = own.attention(heads).window_bias(bias).of(q, k, v).reshape(sizes(&[places * windows, width]));
        let x = s.linear("output.dense", width).bias().row().of(mixed);
        let x = x.reshape(sizes(&[side, side, rows, columns, width])).transpose(&[0, 3, 1, 4, 2, 5]);
        let x = x.reshape(sizes(&[height, across, width]));
        let x = rolled(x, [height, across].map(|places| (places - shift) % places));
        cut(cut(x, 1, stage.grid[0]), 2, stage.grid[1]).reshape(sizes(&[stage.grid[0] * stage.grid[1], width]))
    }
}

/// Each stage sees half of the places, twice as wide.
fn stages(keys: &Keys, patches: [usize; 2]) -> Result<Vec<Stage>, GraphError> {
    let (depths, heads) = (keys.sizes("depths", &[2, 2, 6, 2])?, keys.sizes("num_heads", &[3, 6, 12, 24])?);
    if heads.len() != depths.len() {
        return Err(keys.fault("num_heads", format!("{} stages, but depths has {}", heads.len(), depths.len())));
    }
    let ratio = f64::from(keys.positive("mlp_ratio", 4.0)?);
    let mut stages = Vec::new();
    let (mut width, mut grid) = (keys.size("embed_dim", 96)?, patches);
    for (blocks, heads) in std::iter::zip(depths, heads) {
        if width > LARGEST_WIDTH {
            return Err(
                keys.fault("embed_dim", format!("a stage would be {width} wide, at most {LARGEST_WIDTH} is supported"))
            );
        }
        if !width.is_multiple_of(heads) {
            return Err(
                keys.fault("num_heads", format!("a stage is {width} wide, which does not divide by {heads} heads"))
            );
        }
        let ffn = (ratio * width as f64) as usize;
        if !(1..=64 * LARGEST_WIDTH).contains(&ffn) {
            return Err(keys.fault("mlp_ratio", format!("{ratio} makes blocks {ffn} wide")));
        }
        stages.push(Stage { width, ffn, blocks, heads, grid });
        (width, grid) = (2 * width, grid.map(|places| places.div_ceil(2)));
    }
    Ok(stages)
}

impl Stage {
    /// Squares of four places become one: its columns one after the other, from above.
    fn merge<'g>(&self, s: &Scope<'g>, x: Tensor<'g>) -> Tensor<'g> {
        let (batch, width) = (x.ty().shape[0], self.width.into());
        let [rows, columns] = self.grid.map(|places| places.div_ceil(2));
        let x = x.reshape([batch, self.grid[0].into(), self.grid[1].into(), width]);
        let x = padded(padded(x, 1, self.grid[0] % 2), 2, self.grid[1] % 2);
        let x = x.reshape([batch, rows.into(), 2.into(), columns.into(), 2.into(), width]);
        let x = x.transpose(&[0, 1, 3, 4, 2, 5]).reshape([batch, (rows * columns).into(), (4 * self.width).into()]);
        s.linear("reduction", 2 * self.width).of(s.layer_norm("norm", EPSILON).of(x))
    }
}

fn padded<'g>(x: Tensor<'g>, axis: usize, after: usize) -> Tensor<'g> {
    if after == 0 { x } else { x.pad(axis, after) }
}

/// Both axes of the picture, up and to the left.
fn rolled<'g>(x: Tensor<'g>, by: [usize; 2]) -> Tensor<'g> {
    if by == [0, 0] { x } else { x.roll(1, by[0]).roll(2, by[1]) }
}

/// The first `size` places of an axis.
fn cut<'g>(x: Tensor<'g>, axis: usize, size: usize) -> Tensor<'g> {
    if x.ty().shape[axis].fixed() == Some(size) { x } else { x.slice(axis, 0, size) }
}
