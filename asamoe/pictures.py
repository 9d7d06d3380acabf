"The first edition's name of `asamoe.denoiser.pictures`."
from asamoe.denoiser.models import bundled, from_pretrained, model_folder
from asamoe.denoiser.pictures import *
