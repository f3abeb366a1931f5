app_name = "saes"
urlpatterns: list = []
