//! `lowrank align`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::random::{generator, key_of};
use lowrank_models::adapter::LambdaOrthogonality;
use lowrank_models::alignment::{
    AlignmentLoss, AlignmentMaps, Backward, BackwardKind, LossWeights, Retrieval, backfilling, backfilling_order,
    centre_distances, retrieval,
};
use lowrank_models::hub::TensorFiles;
use lowrank_optim::AdamWConfig;
use rand::seq::SliceRandom;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::folder;
use super::output::{print, table};
use crate::build::{BuildError, Listener};
use crate::process::{device, files};
use crate::run::report::Console;

/// Map the embeddings of a new model into the space of an old one, so that a gallery of old embeddings need not be computed again at once.
///
/// Both files hold `embeddings` [items, width] of the same items in the same order, and `labels` [items] with the number of each item's class; `lowrank
/// embed` writes them, and so can any other program. Learned are a map of new embeddings into the old space, kept within a radius of orthogonality, and a map
/// of old embeddings onto it. OUT/map.safetensors holds the weights as PyTorch's linear layers have them (`backward.weight` [d_new, d_new], `forward.weight`
/// [d_new, d_old], and biases), OUT/report.json the measures: the share of right nearest items (top 1), the mean average precision, and the curve of
/// top 1 while the gallery is embedded again, the items farthest from their class first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank align --old old.safetensors --new new.safetensors --lambda 12 --out map
  lowrank align --old o.safetensors --new n.safetensors --test-old o-test.safetensors --test-new n-test.safetensors --map rotation --out strict")]
pub struct Args {
    /// Embeddings of the old model
    #[arg(long, value_name = "FILE")]
    old: PathBuf,
    /// Embeddings of the new model
    #[arg(long, value_name = "FILE")]
    new: PathBuf,
    /// Old embeddings of other items, to measure on; the items of the training when not given
    #[arg(long, value_name = "FILE", requires = "test_new")]
    test_old: Option<PathBuf>,
    /// New embeddings of those items
    #[arg(long, value_name = "FILE", requires = "test_old")]
    test_new: Option<PathBuf>,
    /// Map of new embeddings
    #[arg(long, value_enum, default_value_t = Kind::Affine)]
    map: Kind,
    /// Distance from orthogonality that an affine map has for nothing; 12 is meant for widths of 512 to 1024, inf leaves the map free
    #[arg(long, default_value_t = 12.0)]
    lambda: f64,
    /// Steepness of the penalty at lambda
    #[arg(long, default_value_t = 10.0)]
    alpha: f64,
    /// Strength of the penalty
    #[arg(long, default_value_t = 1.0)]
    weight: f64,
    /// Weight of the distance of mapped old embeddings from mapped new ones
    #[arg(long, default_value_t = 1.0)]
    forward_weight: f64,
    /// Weight of the distance of mapped new embeddings from old ones
    #[arg(long, default_value_t = 1.0)]
    backward_weight: f64,
    /// Weight of the contrast between classes
    #[arg(long, default_value_t = 1.0)]
    contrastive_weight: f64,
    /// Temperature of the contrast
    #[arg(long, default_value_t = 0.1)]
    temperature: f64,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Passes over the items
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    epochs: u32,
    /// Items in a batch
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    batch: u32,
    /// Seed of the order of the items
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write; it must not exist yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Show warnings and errors only
    #[arg(long)]
    quiet: bool,
}

/// Kind of the map of new embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Weight and bias
    Affine,
    /// A rotation: strictly orthogonal
    Rotation,
}

/// Embeddings of the same items by two models.
struct Pairs {
    old: Tensor<2>,
    new: Tensor<2>,
    labels: Option<Vec<i32>>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let loss = loss(&args)?;
    folder::refuse_existing(&args.out)?;
    let device = device("cpu").map_err(BuildError::from)?;
    let train = Pairs::read(&args.old, &args.new, &device)?;
    let test = match (&args.test_old, &args.test_new) {
        (Some(old), Some(new)) => Some(Pairs::read(old, new, &device)?),
        _ => None,
    };
    if let Some(test) = &test
        && test.widths() != train.widths()
    {
        return Err(refused(format!(
            "--test-old and --test-new have the widths {:?}, --old and --new {:?}; name embeddings of the same models",
            test.widths(),
            train.widths()
        )));
    }
    let mut console = Console::new(args.quiet);
    let maps = trained(&args, &loss, &train, &device, &mut console)?;
    let measured = test.as_ref().unwrap_or(&train);
    let report = report(&args, &loss, &maps, &train, measured);
    folder::whole(&args.out, |dir| {
        write_maps(&maps, &dir.join("map.safetensors"))?;
        Ok(files::write_whole(&dir.join("report.json"), format!("{report:#}\n").as_bytes())?)
    })?;
    let shown = if args.json { format!("{report:#}\n") } else { format!("{}{}\n", lines(&report), args.out.display()) };
    print(&shown)?;
    Ok(ExitCode::SUCCESS)
}

fn refused(problem: String) -> anyhow::Error {
    BuildError::Settings(problem).into()
}

/// The loss of the arguments, whose numbers are checked.
fn loss(args: &Args) -> anyhow::Result<AlignmentLoss> {
    let least = |name: &str, value: f64, positive: bool, infinite: bool| -> anyhow::Result<f64> {
        let fits = value >= 0.0 && !(positive && value == 0.0) && (infinite || value.is_finite());
        if fits {
            return Ok(value);
        }
        let allowed = if positive { "greater than 0" } else { "at least 0" };
        Err(refused(format!("--{name} {value}: it must be a number {allowed}")))
    };
    least("lr", args.lr, true, false)?;
    Ok(AlignmentLoss {
        weights: LossWeights {
            forward: least("forward-weight", args.forward_weight, false, false)?,
            backward: least("backward-weight", args.backward_weight, false, false)?,
            contrastive: least("contrastive-weight", args.contrastive_weight, false, false)?,
        },
        temperature: least("temperature", args.temperature, true, false)?,
        penalty: LambdaOrthogonality {
            lambda: least("lambda", args.lambda, false, true)?,
            alpha: least("alpha", args.alpha, true, false)?,
            weight: least("weight", args.weight, false, false)?,
        },
    })
}

/// Trains the maps on shuffled batches.
fn trained(
    args: &Args,
    loss: &AlignmentLoss,
    pairs: &Pairs,
    device: &Device,
    console: &mut Console,
) -> anyhow::Result<AlignmentMaps> {
    let kind = match args.map {
        Kind::Affine => BackwardKind::Affine,
        Kind::Rotation => BackwardKind::Rotation,
    };
    let mut maps = AlignmentMaps::new(kind, pairs.widths(), device);
    let mut optimizer = AdamWConfig::new().init();
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    console.begin("aligning", u64::from(args.epochs));
    for epoch in 0..args.epochs {
        order.shuffle(&mut generator(args.seed, key_of("align.order"), u64::from(epoch)));
        let mut last = 0.0;
        // A last batch of one item has no other item to contrast it with.
        for items in order.chunks(args.batch as usize).filter(|items| items.len() > 1 || pairs.len() == 1) {
            let batch = pairs.select(items, device);
            let parts = loss.parts(&maps, batch.old, batch.new, batch.labels.as_deref());
            let sum = loss.sum(&parts);
            last = host(sum.clone())[0];
            if !last.is_finite() {
                return Err(anyhow::anyhow!("the loss is {last} in epoch {}; lower --lr", epoch + 1));
            }
            let grads = GradientsParams::from_grads(sum.backward(), &maps);
            maps = optimizer.step(args.lr, maps, grads);
        }
        console.advance(u64::from(epoch + 1));
        console.line(&format!("epoch {} of {}: loss {last:.4}", epoch + 1, args.epochs));
    }
    console.end();
    Ok(maps)
}

impl Pairs {
    fn read(old: &Path, new: &Path, device: &Device) -> anyhow::Result<Self> {
        let ((old_rows, old_labels), (new_rows, new_labels)) = (embeddings(old, device)?, embeddings(new, device)?);
        let [items, others] = [&old_rows, &new_rows].map(|rows| rows.dims()[0]);
        if items != others {
            return Err(refused(format!(
                "{} has {items} embeddings and {} has {others}; both must be of the same items",
                old.display(),
                new.display()
            )));
        }
        if let (Some(one), Some(two)) = (&old_labels, &new_labels)
            && let Some(item) = (0..items).find(|item| one[*item] != two[*item])
        {
            return Err(refused(format!(
                "item {item} has label {} in {} and {} in {}; both must be of the same items in the same order",
                one[item],
                old.display(),
                two[item],
                new.display()
            )));
        }
        Ok(Self { old: old_rows, new: new_rows, labels: old_labels.or(new_labels) })
    }

    fn len(&self) -> usize {
        self.old.dims()[0]
    }

    /// Widths of old and new embeddings.
    fn widths(&self) -> [usize; 2] {
        [self.old.dims()[1], self.new.dims()[1]]
    }

    /// Some items, with gradients.
    fn select(&self, items: &[usize], device: &Device) -> Self {
        let places: Vec<i32> = items.iter().map(|item| *item as i32).collect();
        let places = Tensor::from_data(TensorData::new(places, [items.len()]), device);
        let rows = |all: &Tensor<2>| Tensor::from_inner(all.clone().select(0, places.clone()));
        Self {
            old: rows(&self.old),
            new: rows(&self.new),
            labels: self.labels.as_ref().map(|labels| items.iter().map(|item| labels[*item]).collect()),
        }
    }
}

/// `embeddings` and `labels` of a file.
fn embeddings(path: &Path, device: &Device) -> anyhow::Result<(Tensor<2>, Option<Vec<i32>>)> {
    let (mut files, _) = TensorFiles::of_file(path).map_err(BuildError::from)?;
    let shape = |files: &TensorFiles, name: &str| {
        files.shapes().find(|(known, _)| *known == name).map(|(_, shape)| shape.to_vec())
    };
    let [items, width] = match shape(&files, "embeddings").as_deref() {
        Some([items, width]) if *items > 1 && *width > 0 => [*items, *width],
        found => {
            let found = found.map_or("there is none".into(), |shape| format!("it has the shape {shape:?}"));
            return Err(refused(format!(
                "{}: needs a tensor `embeddings` [items, width] of at least two items; {found}",
                path.display()
            )));
        }
    };
    let values = files.take("embeddings", &[items, width]).map_err(BuildError::from)?;
    if let Some(place) = values.iter().position(|value| !value.is_finite()) {
        return Err(refused(format!(
            "{}: the embedding of item {} is not finite; compute it again",
            path.display(),
            place / width
        )));
    }
    let labels = match shape(&files, "labels") {
        None => None,
        Some(shape) if shape == [items] => {
            let labels = files.take_whole("labels", &[items]).map_err(BuildError::from)?;
            let labels: Vec<i32> = labels.into_iter().map(|label| label as i32).collect();
            // Files of images without classes have -1 for each.
            labels.iter().any(|label| *label >= 0).then_some(labels)
        }
        Some(shape) => {
            return Err(refused(format!("{}: labels have the shape {shape:?} instead of [{items}]", path.display())));
        }
    };
    Ok((Tensor::from_data(TensorData::new(values, [items, width]), device), labels))
}

/// Measures on the items of `pairs`.
fn report(args: &Args, loss: &AlignmentLoss, maps: &AlignmentMaps, train: &Pairs, pairs: &Pairs) -> Value {
    let plain = |rows: Tensor<2>| rows.without_autodiff();
    let lifted = |rows: &Tensor<2>| Tensor::from_inner(rows.clone());
    let mapped_new = plain(maps.new_in_old(lifted(&pairs.new)));
    let mapped_old = plain(maps.old_in_new(lifted(&pairs.old)));
    let all = loss.parts(maps, lifted(&train.old), lifted(&train.new), None);
    let number = |tensor: Tensor<1>| host(tensor)[0];
    let mut report = json!({
        "items": pairs.len(),
        "widths": { "old": pairs.widths()[0], "new": pairs.widths()[1] },
        "lambda": args.lambda.is_finite().then_some(args.lambda),
        "loss_forward": number(all.forward),
        "loss_backward": number(all.backward),
    });
    if let Backward::Affine(map) = &maps.backward {
        report["defect"] = json!(number(LambdaOrthogonality::defect(map.weight.val())));
    }
    let Some(labels) = &pairs.labels else { return report };
    let labels = labels.as_slice();
    let of = |queries: &Tensor<2>, gallery: &Tensor<2>| {
        let Retrieval { top_1, mean_average_precision } =
            retrieval(queries.clone(), gallery.clone(), [labels, labels], true);
        json!({ "top_1": top_1, "map": mean_average_precision })
    };
    let (old, new) = (&pairs.old, &pairs.new);
    report["retrieval"] = json!({
        "old in old": of(old, old),
        "new in new": of(new, new),
        "mapped new in old": of(&mapped_new, old),
        "mapped new in mapped old": of(&mapped_new, &mapped_old),
        "mapped old in mapped old": of(&mapped_old, &mapped_old),
        "mapped new in mapped new": of(&mapped_new, &mapped_new),
    });
    let order = backfilling_order(&centre_distances(mapped_old.clone(), labels));
    let (curve, area) = backfilling(mapped_new, mapped_old, labels, &order);
    report["backfilling"] = json!({ "curve": curve, "area": area });
    report
}

/// The report as lines.
fn lines(report: &Value) -> String {
    let four = |value: &Value| value.as_f64().map_or_else(String::new, |value| format!("{value:.4}"));
    let mut rows = vec![vec!["distance from old embeddings".to_string(), four(&report["loss_backward"])]];
    if !report["defect"].is_null() {
        rows.push(vec!["distance from orthogonality".into(), four(&report["defect"])]);
    }
    if let Some(retrievals) = report["retrieval"].as_object() {
        rows.push(vec!["queries in gallery".into(), "top 1".into(), "mAP".into()]);
        rows.extend(
            retrievals.iter().map(|(name, of)| vec![format!("  {name}"), four(&of["top_1"]), four(&of["map"])]),
        );
    }
    if let Some(curve) = report["backfilling"]["curve"].as_array() {
        let points: Vec<String> = curve.iter().map(four).collect();
        rows.push(vec!["top 1 while the gallery is embedded again".into(), points.join(" ")]);
        rows.push(vec!["  area below".into(), four(&report["backfilling"]["area"])]);
    }
    table(&rows)
}

/// Writes the maps as PyTorch's linear layers have them.
fn write_maps(maps: &AlignmentMaps, path: &Path) -> anyhow::Result<()> {
    let mut tensors: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut put = |name: &'static str, shape: Vec<usize>, values: Vec<f32>| {
        tensors.insert(name, (shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()));
    };
    let mut matrix = |name: &'static str, matrix: Tensor<2>| put(name, matrix.dims().to_vec(), host(matrix));
    match &maps.backward {
        Backward::Affine(map) => matrix("backward.weight", map.weight.val().transpose()),
        Backward::Rotation(map) => matrix("backward.weight", map.matrix()),
    }
    matrix("forward.weight", maps.forward.weight.val().transpose());
    let biases = match &maps.backward {
        Backward::Affine(map) => vec![("backward.bias", &map.bias), ("forward.bias", &maps.forward.bias)],
        Backward::Rotation(_) => vec![("forward.bias", &maps.forward.bias)],
    };
    for (name, bias) in biases {
        if let Some(bias) = bias {
            put(name, bias.val().dims().to_vec(), host(bias.val()));
        }
    }
    let mut views = BTreeMap::new();
    for (name, (shape, bytes)) in &tensors {
        views.insert(*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?);
    }
    Ok(files::write_whole(path, &safetensors::serialize(views, None)?)?)
}
