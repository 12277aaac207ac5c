//! `lowrank embed`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::hub::VisionModel;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::folder::refuse_existing;
use super::on_model::Adapters;
use super::output::print;
use super::training::texts;
use super::vision_folder::VisionOf;
use crate::build::{BuildError, Listener};
use crate::config::{Config, Layers, count};
use crate::data::images::ImageSet;
use crate::process::{device, files};
use crate::run::report::Console;

/// Compute the embeddings of images, as a safetensors file.
///
/// The file holds `embeddings` [images, width] in f32, and `labels` [images] with the number of each image's class, -1 without one; its metadata
/// list the classes under `classes` and the files under `images`, as JSON. A vision transformer gives its class token after the last norm, a CLIP
/// its projected image embedding of length 1, a CLIP vision tower alone the same of its own length, all as `transformers` does.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank embed --model clip-vit-base-patch32 --data photos/ --out photos.safetensors
  lowrank embed --model vit --adapter runs/vit-lora-001/checkpoints/step-000300 --data test.jsonl --out test.safetensors")]
pub struct Args {
    /// Model folder of a ViT or a CLIP
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    adapters: Adapters,
    /// Images: a folder DIR/class/*, JSON lines, an IDX file or a single image; may be repeated
    #[arg(long, value_name = "PATH", required = true)]
    data: Vec<PathBuf>,
    /// File to write; it must not exist yet
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Images in a batch
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// A setting of the data section, as section.key=value; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// cpu, or a GPU of a build with that feature
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut layers = Layers::default();
    args.set.iter().try_for_each(|setting| layers.set(setting)).map_err(BuildError::from)?;
    layers.flag("--data", "data.path", texts(&args.data));
    let config = layers.resolve(&Config::default()).map_err(BuildError::from)?;
    refuse_existing(&args.out)?;
    let device = device(&args.device).map_err(BuildError::from)?;
    let vision = VisionOf::open(&args.model)?;
    let model = vision.load(&args.adapters, &device)?;
    let mut console = Console::new(args.quiet);
    console.begin("reading the images", 0);
    let skip = config.data.images.skip_broken;
    let set = ImageSet::read(&config.data.path, &vision.settings, None, skip).map_err(BuildError::from)?;
    console.begin("embedding", set.len() as u64);
    let (mut values, mut width) = (Vec::new(), 0);
    for start in (0..set.len()).step_by(args.batch as usize) {
        let rows = embed(&model, &set, start..set.len().min(start + args.batch as usize), &device)?;
        width = rows.dims()[1];
        values.extend(rows.into_data().try_into_vec::<f32>().unwrap_or_default());
        console.advance(start as u64);
    }
    console.end();
    write(&args.out, &set, &values, width)?;
    let skipped = match set.skipped {
        0 => String::new(),
        skipped => format!("; {} broken images left out", count(skipped as u64)),
    };
    print(&format!("{}: {} embeddings of {width} values{skipped}\n", args.out.display(), count(set.len() as u64)))?;
    Ok(ExitCode::SUCCESS)
}

/// Embeddings `[images, width]` of some images.
fn embed(
    model: &VisionModel,
    set: &ImageSet,
    numbers: std::ops::Range<usize>,
    device: &Device,
) -> Result<Tensor<2>, BuildError> {
    let pictures = numbers.map(|number| set.picture(number)).collect::<Result<Vec<_>, _>>()?;
    let (width, height) = pictures.first().map_or((0, 0), |picture| (picture.width, picture.height));
    let image = match model {
        VisionModel::Vit(model) => model.config().image,
        VisionModel::ClipVision(model) => model.config().image,
        VisionModel::Clip(model) => model.config().vision.image,
        VisionModel::ClipClassifier(model) => model.config().clip.vision.image,
    };
    if (width, height, image.num_channels) != (image.image_size, image.image_size, 3) {
        return Err(BuildError::Settings(format!(
            "preprocessor_config.json makes images of {width} x {height} pixels and 3 colours; the model has image_size {} and num_channels {}: correct one of them",
            image.image_size, image.num_channels
        )));
    }
    let values: Vec<Vec<f32>> = pictures.iter().map(|picture| set.settings().values(picture)).collect();
    let data = TensorData::new(values.concat(), [pictures.len(), 3, height, width]);
    let pixels = Tensor::from_data(data, device);
    Ok(match model {
        VisionModel::Vit(model) => model.pooled(model.hidden(pixels)),
        VisionModel::ClipVision(model) => model.image_embeds(pixels),
        VisionModel::Clip(model) => model.image_embeds(pixels),
        VisionModel::ClipClassifier(model) => model.pooled(model.vision_model.hidden(pixels)),
    })
}

/// Writes the file beside its place and renames it.
fn write(out: &std::path::Path, set: &ImageSet, values: &[f32], width: usize) -> anyhow::Result<()> {
    let embeddings: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let label = |number: usize| set.label(number).map_or(-1, |label| label as i64);
    let labels: Vec<u8> = (0..set.len()).flat_map(|number| label(number).to_le_bytes()).collect();
    let names: Vec<String> = (0..set.len()).map(|number| set.name(number)).collect();
    let tensors = BTreeMap::from([
        ("embeddings", TensorView::new(Dtype::F32, vec![set.len(), width], &embeddings)?),
        ("labels", TensorView::new(Dtype::I64, vec![set.len()], &labels)?),
    ]);
    let metadata = HashMap::from([
        ("classes".to_string(), json!(set.labels).to_string()),
        ("images".to_string(), json!(names).to_string()),
    ]);
    Ok(files::write_whole(out, &safetensors::serialize(tensors, Some(metadata))?)?)
}
