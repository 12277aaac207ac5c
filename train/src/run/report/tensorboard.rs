//! Event files of TensorBoard.
//!
//! Built from the parts of `tensorboard-rs` that return errors: its `SummaryWriter` ends the process when the disk is full.

use std::fs::File;
use std::io::{BufWriter, Error, Result};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::Value as HyperParameter;
use protobuf::{Message, RepeatedField};
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_proto::plugin_hparams::{HParamsPluginData, SessionStartInfo};
use tensorboard_proto::summary::{Summary, Summary_Image, Summary_Value, SummaryMetadata, SummaryMetadata_PluginData};
use tensorboard_proto::tensor::TensorProto;
use tensorboard_proto::tensor_shape::{TensorShapeProto, TensorShapeProto_Dim};
use tensorboard_proto::types::DataType;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary;

use crate::data::images::Picture;

/// Distinguishes files that one process opens within a second.
static FILES: AtomicU64 = AtomicU64::new(0);

/// Writes one event file.
pub struct TensorBoard {
    records: RecordWriter<BufWriter<File>>,
}

impl TensorBoard {
    /// Opens a new file in `dir` for steps after `step`; TensorBoard hides data of later steps in earlier files.
    ///
    /// Every file has a session start, including the first one: TensorBoard's Python loader treats the first start as
    /// the start of the run, and hides earlier points only from the second one on.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let name = format!("events.out.tfevents.{:010}.lowrank.{}.{number}", now() as u64, std::process::id());
        let file = File::create_new(dir.join(name))?;
        let mut board = Self { records: RecordWriter::new(BufWriter::new(file)) };
        let mut event = Event::new();
        event.set_file_version("brain.Event:2".into());
        board.write(0, event)?;
        let mut session = SessionLog::new();
        session.set_status(SessionLog_SessionStatus::START);
        let mut event = Event::new();
        event.set_session_log(session);
        board.write(first_step(step), event)?;
        board.flush()?;
        Ok(board)
    }

    /// Writes a number.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<()> {
        self.summary(step, summary::scalar(tag, value as f32))
    }

    /// Writes a text; Markdown is rendered.
    pub fn text(&mut self, tag: &str, step: u64, text: &str) -> Result<()> {
        let mut dimension = TensorShapeProto_Dim::new();
        dimension.set_size(1);
        let mut shape = TensorShapeProto::new();
        shape.set_dim(RepeatedField::from(vec![dimension]));
        let mut tensor = TensorProto::new();
        tensor.set_dtype(DataType::DT_STRING);
        tensor.set_tensor_shape(shape);
        tensor.set_string_val(RepeatedField::from(vec![text.as_bytes().to_vec()]));
        let mut value = Summary_Value::new();
        value.set_tag(format!("{tag}/text_summary"));
        value.set_metadata(plugin("text", Vec::new()));
        value.set_tensor(tensor);
        self.value(step, value)
    }

    /// Writes a picture.
    pub fn picture(&mut self, tag: &str, step: u64, picture: &Picture) -> Result<()> {
        let mut image = Summary_Image::new();
        image.set_width(picture.width as i32);
        image.set_height(picture.height as i32);
        image.set_colorspace(3);
        image.set_encoded_image_string(picture.png().map_err(Error::other)?);
        let mut value = Summary_Value::new();
        value.set_tag(tag.into());
        value.set_image(image);
        self.value(step, value)
    }

    /// Writes the distribution of values. Values that are infinite or not a number are rejected.
    pub fn histogram(&mut self, tag: &str, step: u64, values: &[f32]) -> Result<()> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return Err(Error::other(format!("{tag}: a histogram needs finite values")));
        }
        let histogram = Histogram::of(values);
        let summary = summary::histogram_raw(
            tag,
            histogram.min,
            histogram.max,
            values.len() as f64,
            histogram.sum,
            histogram.sum_squares,
            &histogram.limits,
            &histogram.counts,
        );
        self.summary(step, summary)
    }

    /// Writes settings of the run for the table of hyper-parameters.
    pub fn hyper_parameters<'a>(
        &mut self,
        step: u64,
        name: &str,
        settings: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<()> {
        let mut start = SessionStartInfo::new();
        for (key, text) in settings {
            let mut value = HyperParameter::new();
            match (text.parse::<f64>(), text.parse::<bool>()) {
                (Ok(number), _) => value.set_number_value(number),
                (_, Ok(flag)) => value.set_bool_value(flag),
                _ => value.set_string_value(text.trim_matches('"').into()),
            }
            start.mut_hparams().insert(key.into(), value);
        }
        start.set_group_name(name.into());
        start.set_start_time_secs(now());
        let mut data = HParamsPluginData::new();
        data.set_session_start_info(start);
        let content = data.write_to_bytes().map_err(Error::other)?;
        let mut value = Summary_Value::new();
        value.set_tag("_hparams_/session_start_info".into());
        value.set_metadata(plugin("hparams", content));
        self.value(step, value)
    }

    /// Flushes all data to the file.
    pub fn flush(&mut self) -> Result<()> {
        self.records.flush()
    }

    fn value(&mut self, step: u64, value: Summary_Value) -> Result<()> {
        let mut summary = Summary::new();
        summary.set_value(RepeatedField::from(vec![value]));
        self.summary(step, summary)
    }

    fn summary(&mut self, step: u64, summary: Summary) -> Result<()> {
        let mut event = Event::new();
        event.set_summary(summary);
        self.write(step, event)
    }

    fn write(&mut self, step: u64, mut event: Event) -> Result<()> {
        event.set_step(step as i64);
        event.set_wall_time(now());
        self.records.write(&event.write_to_bytes().map_err(Error::other)?)
    }
}

/// First step that a file for steps after `step` may hold: 0 for a new run, which has texts of its own.
pub fn first_step(step: u64) -> u64 {
    if step == 0 { 0 } else { step + 1 }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn plugin(name: &str, content: Vec<u8>) -> SummaryMetadata {
    let mut data = SummaryMetadata_PluginData::new();
    data.set_plugin_name(name.into());
    data.set_content(content);
    let mut metadata = SummaryMetadata::new();
    metadata.set_plugin_data(data);
    metadata
}

/// Counts in buckets whose limits grow by a tenth, as in TensorBoard's own writers; empty buckets at the ends are left
/// out.
struct Histogram {
    min: f64,
    max: f64,
    sum: f64,
    sum_squares: f64,
    limits: Vec<f64>,
    counts: Vec<f64>,
}

impl Histogram {
    fn of(values: &[f32]) -> Self {
        let mut positive = vec![1e-12];
        while positive[positive.len() - 1] < 1e20 {
            positive.push(positive[positive.len() - 1] * 1.1);
        }
        positive.push(f64::MAX);
        let mut limits: Vec<f64> = positive.iter().rev().map(|limit| -limit).collect();
        limits.push(0.0);
        limits.extend(&positive);
        let mut counts = vec![0.0; limits.len()];
        let (mut min, mut max, mut sum, mut sum_squares) = (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0.0);
        for value in values.iter().map(|value| f64::from(*value)) {
            counts[limits.partition_point(|limit| *limit < value)] += 1.0;
            (min, max) = (min.min(value), max.max(value));
            sum += value;
            sum_squares += value * value;
        }
        let first = counts.iter().position(|count| *count > 0.0).unwrap_or(0).saturating_sub(1);
        let last = counts.iter().rposition(|count| *count > 0.0).unwrap_or(0);
        limits.truncate(last + 1);
        counts.truncate(last + 1);
        Self { min, max, sum, sum_squares, limits: limits.split_off(first), counts: counts.split_off(first) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Payloads of all records of the only file in a folder.
    fn events(dir: &Path) -> Vec<Event> {
        let path = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        let mut rest = &std::fs::read(path).unwrap()[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(Event::parse_from_bytes(&rest[12..12 + len]).unwrap());
            rest = &rest[12 + len + 4..];
        }
        events
    }

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path(), 7).unwrap();
        board.scalar("train/loss", 8, 2.5).unwrap();
        board.text("sample", 8, "once upon").unwrap();
        board.histogram("weights/w", 8, &[0.0, -1.0, 2.0, 2.0]).unwrap();
        board.hyper_parameters(8, "run", [("lr", "0.5"), ("flag", "true"), ("name", "\"adamw\"")].into_iter()).unwrap();
        board.picture("images", 8, &Picture::grey(2, 1, &[7, 9])).unwrap();
        board.flush().unwrap();
        let events = events(dir.path());
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        assert_eq!(
            (events[1].get_step(), events[1].get_session_log().get_status()),
            (8, SessionLog_SessionStatus::START)
        );
        let value = |i: usize| &events[i].get_summary().get_value()[0];
        assert_eq!((value(2).get_tag(), value(2).get_simple_value(), events[2].get_step()), ("train/loss", 2.5, 8));
        assert_eq!(value(3).get_tensor().get_string_val()[0], b"once upon");
        let histogram = value(4).get_histo();
        assert_eq!((histogram.get_num(), histogram.get_sum(), histogram.get_max()), (4.0, 3.0, 2.0));
        assert_eq!(histogram.get_bucket().iter().sum::<f64>(), 4.0);
        assert_eq!(histogram.get_bucket().len(), histogram.get_bucket_limit().len());
        let image = value(6).get_image();
        assert_eq!((image.get_width(), image.get_height(), image.get_colorspace()), (2, 1, 3));
        assert!(image.get_encoded_image_string().starts_with(b"\x89PNG"));
        assert!(events.len() == 7);
    }

    #[test]
    fn the_first_file_starts_a_session_too() {
        let dir = tempfile::tempdir().unwrap();
        TensorBoard::create(dir.path(), 0).unwrap();
        let events = events(dir.path());
        let start = &events[1];
        assert_eq!((start.get_step(), start.get_session_log().get_status()), (0, SessionLog_SessionStatus::START));
    }

    #[test]
    fn failures_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path(), 0).unwrap();
        assert!(board.histogram("w", 1, &[f32::NAN]).is_err());
        assert!(TensorBoard::create(Path::new("/dev/null/folder"), 0).is_err());
    }
}
