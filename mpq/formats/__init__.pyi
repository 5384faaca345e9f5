from .format import FORMATS as FORMATS
from .format import Format as Format
from .format import NoiseModel as NoiseModel
from .format import get_format as get_format
from .quantize import dequantize as dequantize
from .quantize import fake_quantize as fake_quantize
from .quantize import noise_variance as noise_variance
from .quantize import scale_of as scale_of
