//! PNG and JPEG files as pictures.

use std::io::Cursor;

use image::io::Reader;
use image::{DynamicImage, ImageFormat};

use super::exif::orientation;
use super::picture::Picture;

/// Largest number of pixels.
const LARGEST: u64 = 1 << 26;

/// Decodes a file; the error is a problem without the name of the file.
///
/// Grey pictures get three equal colours, and a JPEG is turned as its EXIF data say, as `transformers` and Pillow do. Rejected: other
/// formats, truncated files, transparency, CMYK and more than 8 bits a colour, whose conversion has more than one meaning.
pub fn decode(bytes: &[u8]) -> Result<Picture, String> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => format,
        Ok(other) => return Err(format!("is {other:?}; only PNG and JPEG can be read")),
        Err(_) => return Err("is neither PNG nor JPEG, whatever its name says".into()),
    };
    let turns = match format {
        ImageFormat::Jpeg => checked_jpeg(bytes)?,
        _ => 1,
    };
    let broken = |error: image::ImageError| format!("cannot be decoded: {error}");
    let reader = || Reader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(broken)?;
    // The header is checked before memory is taken.
    if u64::from(width) * u64::from(height) > LARGEST {
        return Err(format!("has {width} x {height} pixels, more than {LARGEST}; make it smaller"));
    }
    let image = match reader().decode().map_err(broken)? {
        image @ (DynamicImage::ImageLuma8(_) | DynamicImage::ImageRgb8(_)) => image,
        image @ (DynamicImage::ImageLumaA8(_) | DynamicImage::ImageRgba8(_)) => {
            if image.to_rgba8().pixels().any(|pixel| pixel[3] != 255) {
                return Err("has transparent pixels; lay it on a background".into());
            }
            image
        }
        other => return Err(format!("has {:?} pixels; convert it to 8 bits a colour", other.color())),
    };
    let image = image.into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Picture { width, height, pixels: image.into_raw() }.oriented(turns))
}

/// Orientation by EXIF, 1 to 8. Rejects a JPEG file that ends early, which decoders may fill up with grey, and one in CMYK.
fn checked_jpeg(bytes: &[u8]) -> Result<u8, String> {
    const TRUNCATED: &str = "is truncated";
    let (mut at, mut turns) = (2, 1);
    loop {
        let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == 0xff)) else {
            return Err(TRUNCATED.into());
        };
        at += offset + 1;
        match bytes.get(at) {
            None => return Err(TRUNCATED.into()),
            // Stuffed bytes, restarts and fill bytes are part of the data.
            Some(0 | 0x01 | 0xd0..=0xd8 | 0xff) => {}
            Some(0xd9) => return Ok(turns),
            Some(marker) => {
                let Some([high, low]) = bytes.get(at + 1..at + 3) else { return Err(TRUNCATED.into()) };
                let end = at + 1 + usize::from(u16::from_be_bytes([*high, *low]));
                let is_frame = matches!(marker, 0xc0..=0xcf) && ![0xc4, 0xc8, 0xcc].contains(marker);
                if is_frame && bytes.get(at + 8) == Some(&4) {
                    return Err("is in CMYK; convert it to RGB".into());
                }
                if *marker == 0xe1
                    && let Some(found) = bytes.get(at + 3..end).and_then(orientation)
                {
                    turns = found;
                }
                at = end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::ColorType;
    use image::codecs::jpeg::JpegEncoder;
    use image::codecs::png::PngEncoder;

    use super::*;

    fn png(width: u32, height: u32, values: &[u8], kind: ColorType) -> Vec<u8> {
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes).encode(values, width, height, kind).unwrap();
        bytes
    }

    #[test]
    fn pictures_are_decoded_and_odd_ones_refused() {
        let rgb = decode(&png(2, 1, &[1, 2, 3, 4, 5, 6], ColorType::Rgb8)).unwrap();
        assert_eq!(rgb, Picture { width: 2, height: 1, pixels: vec![1, 2, 3, 4, 5, 6] });
        let grey = png(1, 1, &[7], ColorType::L8);
        assert_eq!(decode(&grey).unwrap(), Picture::grey(1, 1, &[7]));
        let opaque = decode(&png(1, 1, &[1, 2, 3, 255], ColorType::Rgba8)).unwrap();
        assert_eq!(opaque.pixels, [1, 2, 3]);
        let mut jpeg = Vec::new();
        JpegEncoder::new(&mut jpeg).encode(&[90; 16 * 8 * 3], 16, 8, ColorType::Rgb8).unwrap();
        let decoded = decode(&jpeg).unwrap();
        assert!(
            (decoded.width, decoded.height) == (16, 8) && decoded.pixels.iter().all(|value| value.abs_diff(90) < 4)
        );
        for (bytes, problem) in [
            (png(1, 1, &[1, 2, 3, 254], ColorType::Rgba8), "transparent"),
            (png(1, 1, &[1, 2], ColorType::L16), "8 bits"),
            (b"not an image".to_vec(), "neither PNG nor JPEG"),
            (Vec::new(), "neither PNG nor JPEG"),
            (b"GIF89a....".to_vec(), "only PNG and JPEG"),
            (grey[..grey.len() - 20].to_vec(), "cannot be decoded"),
            (jpeg[..jpeg.len() - 2].to_vec(), "truncated"),
            (jpeg[..jpeg.len() / 2].to_vec(), "truncated"),
        ] {
            let reason = decode(&bytes).unwrap_err();
            assert!(reason.contains(problem), "{reason}");
        }
    }
}
