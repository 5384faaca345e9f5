from .figures import paper_figures as paper_figures
from .figures import write_figures as write_figures
from .page import appendix as appendix
